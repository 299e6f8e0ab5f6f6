"""``hps-numba doctor``: what is installed, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hps_numba import __version__
from hps_numba.cli._output import AsJson, human_seconds, print_facts, print_json

if TYPE_CHECKING:
    from hps_numba.cli._hardware import Hardware

__all__ = ["EXTRAS", "PLUGIN", "gpu_advice"]

REQUIRED = ("numba", "numpy", "h5py", "pydantic", "typer", "rich")
EXTRAS = {
    "cuda12": ("numba-cuda", "cupy-cuda12x"),
    "cuda13": ("numba-cuda", "cupy-cuda13x"),
    "torch": ("torch",),
    "tensorflow": ("tensorflow",),
    "keras2": ("tensorflow", "tf-keras"),
    "plot": ("matplotlib",),
    "parquet": ("pyarrow",),
    "safetensors": ("safetensors",),
    "redis": ("redis", "hiredis"),
    "rocksdb": ("rocksdict",),
    "fsspec": ("fsspec",),
    "kafka": ("confluent-kafka",),
    "serve": ("uvicorn", "httptools", "uvloop", "grpcio", "protobuf"),
    "ray": ("ray", "uvicorn"),
    "metrics": ("prometheus-client", "opentelemetry-api"),
    "nvtx": ("nvtx",),
    "examples": ("tokenizers", "safetensors", "matplotlib"),
}
"""The extras of this package, and the packages that each needs."""


def doctor(as_json: AsJson = False) -> None:
    """Show what is installed and what is missing.

    Inspects this machine and this installation, gives the commands that fix what is missing, and serves a small model as a
    test. The exit code is 1 if the test fails.
    """
    from hps_numba.cli._hardware import inspect_hardware

    hardware = inspect_hardware()
    report: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "extras": {extra: _extra(extra) for extra in EXTRAS},
        "hardware": asdict(hardware),
        "kernel_cache": _kernel_cache(),
        "miss_rates": _miss_rates(),
        "self_test": _self_test(),
    }
    report["advice"] = _advice(hardware, report)
    report["ok"] = report["self_test"]["ok"]
    if as_json:
        print_json(report)
    else:
        _show(hardware, report)
    if not report["ok"]:
        raise typer.Exit(1)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(extra: str) -> dict[str, Any]:
    versions = {name: _version(name) for name in EXTRAS[extra]}
    return {"installed": None not in versions.values(), "packages": versions, "install": _pip(extra)}


def _pip(extra: str) -> str:
    return f'pip install "hps-numba[{extra}]"'


def _kernel_cache() -> dict[str, Any]:
    from hps_numba.kernels.compiler import disk_cache

    inside = disk_cache.folder(".object")
    folder = None if inside is None else inside.parent
    files = [] if folder is None else [file for file in folder.rglob("*") if file.is_file()]
    return {"folder": folder, "writable": folder is not None, "bytes": sum(file.stat().st_size for file in files)}


def _miss_rates() -> dict[str, Any]:
    """What lookups of this user's processes have learned of the ways to bring missed rows to a GPU."""
    from hps_numba.server.miss_rates import kept_miss_rates

    return kept_miss_rates()


def _self_test() -> dict[str, Any]:
    """Serve 1000 rows of a model in the form of HugeCTR HPS and check each of them."""
    started = time.perf_counter()
    try:
        wrong = _wrong_rows_of_a_small_model()
        problem = f"{wrong} of 1000 rows were wrong" if wrong else None
    except Exception as error:  # whatever it is, the user has to see it
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"ok": problem is None, "problem": problem, "seconds": time.perf_counter() - started}


def _wrong_rows_of_a_small_model() -> int:
    import numpy as np

    from hps_numba.server.hps import HPS
    from hps_numba.storage.model_files import write_model

    rows = np.random.default_rng(0).random((1000, 8), np.float32)
    with tempfile.TemporaryDirectory(prefix="hps_doctor_") as folder:
        path = Path(folder) / "table.model"
        write_model(path, 8, [(np.arange(1000), rows)])
        entry = {
            "model": "doctor",
            "sparse_files": [str(path)],
            "embedding_vecsize_per_table": [8],
            "maxnum_catfeature_query_per_table_per_sample": [1],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [],
        }
        with HPS({"models": [entry]}) as server:
            return int((server.lookup(np.arange(1000), "doctor", 0) != rows).any(axis=1).sum())


# -- advice ---------------------------------------------------------------------


def _advice(hardware: Hardware, report: dict[str, Any]) -> list[str]:
    advice = gpu_advice(hardware, report["extras"], report["packages"]["numpy"])
    if not report["kernel_cache"]["writable"]:
        advice.append("kernels are compiled in every process: set HPS_NUMBA_CACHE_DIR to a writable folder")
    if hardware.huge_pages == "never":
        advice.append(
            "huge pages make large tables faster: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        )
    return advice


def gpu_advice(hardware: Hardware, extras: dict[str, Any], numpy_version: str | None) -> list[str]:
    """What to do to use the GPUs of a machine, a line each; nothing if there are none."""
    from hps_numba.cli._hardware import cuda_extra

    if not hardware.gpus:
        return []
    if hardware.driver_cuda is None:
        return ["there is a GPU, but libcuda.so.1 of the driver cannot be loaded: install or mount the NVIDIA driver"]
    extra = cuda_extra(hardware.driver_cuda, hardware.gpus)
    if extra is None:
        return [
            f"expected a driver for CUDA 12.0 or newer, got one for {_dotted(hardware.driver_cuda)}: update the NVIDIA driver"
        ]
    if not extras[extra]["installed"]:
        return [f"for the GPU: {_pip(extra)} (the driver supports CUDA {_dotted(hardware.driver_cuda)})"]
    if numpy_version is not None and _numbers(numpy_version) >= (2, 5):
        return [f'numpy {numpy_version} is too new for numba-cuda: pip install "numpy<2.5"']
    return []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# -- output ---------------------------------------------------------------------


def _show(hardware: Hardware, report: dict[str, Any]) -> None:
    print_facts([*_installation(report), *_machine(hardware), *_readiness(report)])
    typer.echo("")
    for line in report["advice"]:
        typer.echo(f"advice: {line}")
    typer.echo(_verdict(hardware, report))


def _installation(report: dict[str, Any]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items())
    extras = [(f"  {extra}", _state(found)) for extra, found in report["extras"].items()]
    python = f"{report['python']} on {report['platform']}"
    return [("hps-numba", report["version"]), ("python", python), ("packages", packages), ("extras", ""), *extras]


def _state(extra: dict[str, Any]) -> str:
    if extra["installed"]:
        return ", ".join(f"{name} {version}" for name, version in extra["packages"].items())
    missing = ", ".join(name for name, version in extra["packages"].items() if version is None)
    return f"{missing} missing: {extra['install']}"


def _machine(hardware: Hardware) -> list[tuple[str, str]]:
    from hps_numba.device.host_memory import human_bytes

    names = ", ".join(gpu.name for gpu in hardware.gpus) or "none"
    driver = f" (driver for CUDA {_dotted(hardware.driver_cuda)})" if hardware.driver_cuda else ""
    return [
        ("cpu", f"{hardware.cpu}, {hardware.cores} cores for this process"),
        ("memory", f"{human_bytes(hardware.memory_bytes)}, {human_bytes(hardware.free_bytes)} available"),
        ("gpu", names + driver),
        ("huge pages", hardware.huge_pages or "unknown"),
    ]


def _readiness(report: dict[str, Any]) -> list[tuple[str, str]]:
    from hps_numba.cli._miss_rates import shown_rates
    from hps_numba.device.host_memory import human_bytes

    cache, test, rates = report["kernel_cache"], report["self_test"], shown_rates(report["miss_rates"]["rates"])
    where = f"{cache['folder']}, {human_bytes(cache['bytes'])}" if cache["writable"] else "no writable folder"
    served = f"1,000 rows served correctly in {human_seconds(test['seconds'])}"
    missed = [("missed rows", line) for line in rates or ["nothing measured yet: large batches on a GPU do it"]]
    return [("kernel cache", where), *missed, ("self-test", served if test["ok"] else f"FAILED: {test['problem']}")]


def _verdict(hardware: Hardware, report: dict[str, Any]) -> str:
    from hps_numba.device.driver import device_count, why_no_device

    if not report["ok"]:
        return "verdict: not working; see the self-test"
    verdict = f"verdict: ready; serves from host memory with {hardware.cores} core{'s' * (hardware.cores > 1)}"
    if not hardware.gpus:
        return verdict
    return verdict + (f" and from {count} GPU{'s' * (count > 1)}" if (count := device_count()) else f"; {why_no_device()}")


PLUGIN = doctor
