"""Which GPU of which machine this is, by what outlives a process: for measurements that are kept on disk."""

from __future__ import annotations

import ctypes
import logging
import platform
import re
import uuid
from pathlib import Path
from typing import NamedTuple

from hps_numba.device import driver
from hps_numba.errors import DeviceError
from hps_numba.runtime.threads import available_cores

__all__ = ["DeviceIdentity", "device_identity", "machine_name"]

log = logging.getLogger(__name__)
_DRIVER = re.compile(r"\d+\.\d+(\.\d+)*")


class DeviceIdentity(NamedTuple):
    """A GPU where it is.

    Attributes:
        gpu: its name and UUID.   driver: version of its driver.
        machine: processor, cores for this process, and model of the machine, which tells a virtual one from its host. Not
            the name of the host, as a container has another one each time.
    """

    gpu: str
    driver: str
    machine: str


def device_identity(ordinal: int | None) -> DeviceIdentity | None:
    """The identity of a CUDA device; None for the CPU (no ordinal), and where the driver does not tell."""
    if ordinal is None:
        return None
    try:
        name = driver.device_info(ordinal).name
        return DeviceIdentity(f"{name} {_uuid(ordinal)}", _driver_version(), machine_name())
    except (DeviceError, OSError, AttributeError) as problem:
        log.debug("device %d: no identity: %s", ordinal, problem)
        return None


def _uuid(ordinal: int) -> uuid.UUID:
    """By the library itself, as the bindings have it under several names."""
    status, device = driver.cuda.driver.cuDeviceGet(ordinal)
    driver.check("cuDeviceGet", status)
    room = (ctypes.c_ubyte * 16)()
    status = driver.driver_library().cuDeviceGetUuid_v2(room, ctypes.c_int(int(device)))  # of a MIG instance its own
    if status:
        raise DeviceError(f"cuDeviceGetUuid_v2: status {status}")
    return uuid.UUID(bytes=bytes(room))


def _driver_version() -> str:
    text = _text(Path("/proc/driver/nvidia/version")).partition("\n")[0]
    found = _DRIVER.search(text)
    if found is not None:
        return found[0]
    version = ctypes.c_int(0)
    status = driver.driver_library().cuDriverGetVersion(ctypes.byref(version))
    if status:
        raise DeviceError(f"cuDriverGetVersion: status {status}")
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def machine_name() -> str:
    """The machine, as ``DeviceIdentity.machine``."""
    cpus = (line.partition(":")[::2] for line in _text(Path("/proc/cpuinfo")).splitlines())
    cpu = next((value.strip() for key, value in cpus if key.strip() == "model name"), platform.processor())
    parts = [cpu or platform.machine(), f"{available_cores()} cores", _text(Path("/sys/class/dmi/id/product_name")).strip()]
    return ", ".join(filter(None, parts))


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
