"""The hardware of this machine, found without a CUDA package and without a GPU context."""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hps_numba.device.driver import driver_library
from hps_numba.device.machine_memory import available_bytes, total_bytes
from hps_numba.runtime.threads import available_cores

__all__ = ["Gpu", "Hardware", "cuda_extra", "driver_cuda", "gpus", "huge_pages", "inspect_hardware", "resident_bytes"]

_SMI_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU; ``capability`` is its compute capability such as 9.0, None if unknown."""

    name: str
    capability: float | None = None


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine.

    Attributes:
        cpu: name of the processor.
        cores: cores that this process may use.
        memory_bytes, free_bytes: of the machine, or of the control group if they are smaller.
        gpus: visible NVIDIA GPUs.
        driver_cuda: newest CUDA version that the installed driver supports, such as (13, 0); None without a driver.
        huge_pages: "always", "madvise" or "never"; None if the system does not tell.
    """

    cpu: str
    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: tuple[Gpu, ...]
    driver_cuda: tuple[int, int] | None
    huge_pages: str | None


def inspect_hardware() -> Hardware:
    """The hardware as it is now."""
    return Hardware(
        cpu=_cpu_name(),
        cores=available_cores(),
        memory_bytes=total_bytes(),
        free_bytes=available_bytes(),
        gpus=gpus(),
        driver_cuda=driver_cuda(),
        huge_pages=huge_pages(),
    )


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs according to nvidia-smi, or else to the files of the driver, or else to the device nodes."""
    return _gpus_by_smi() or _gpus_by_driver(Path("/proc/driver/nvidia/gpus")) or _gpus_by_nodes(Path("/dev"))


def _gpus_by_smi() -> tuple[Gpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a tool without its driver
        return ()
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines()) if row]
    return tuple(Gpu(name=row[0], capability=_number(row[-1])) for row in rows)


def _gpus_by_driver(folder: Path) -> tuple[Gpu, ...]:
    found = []
    for file in sorted(folder.glob("*/information")):
        fields = dict(line.partition(":")[::2] for line in _text(file).splitlines())
        found.append(Gpu(name=fields.get("Model", "NVIDIA GPU").strip()))
    return tuple(found)


def _gpus_by_nodes(folder: Path) -> tuple[Gpu, ...]:
    return tuple(Gpu(name="NVIDIA GPU") for _ in folder.glob("nvidia[0-9]*"))


def driver_cuda() -> tuple[int, int] | None:
    """The answer of ``cuDriverGetVersion``; this call creates no GPU context."""
    version = ctypes.c_int(0)
    try:
        failed = driver_library().cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def cuda_extra(driver: tuple[int, int], found: tuple[Gpu, ...]) -> str | None:
    """The extra of this package for this driver and these GPUs; None if the driver is too old.

    CUDA 13 supports compute capability 7.5 and newer, so an older chip needs ``cuda12`` with any driver.
    """
    if driver[0] < 12:
        return None
    old_chip = any(gpu.capability is not None and gpu.capability < 7.5 for gpu in found)
    return "cuda12" if driver[0] == 12 or old_chip else "cuda13"


def huge_pages(file: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str | None:
    """The bracketed word of ``always [madvise] never``."""
    chosen = [word for word in _text(file).split() if word.startswith("[")]
    return chosen[0].strip("[]") if chosen else None


def resident_bytes() -> int | None:
    """Resident memory of this process; None if ``/proc`` does not tell."""
    pages = _text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in _text(Path("/proc/cpuinfo")).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
