"""The identity of a GPU: what measurements on disk are filed under."""

from __future__ import annotations

import ctypes
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from support.played_driver import PlayedDriver, play

from hps_numba.device import driver, identity
from hps_numba.device.identity import device_identity, machine_name

UUID = uuid.UUID(int=0x0102030405060708090A0B0C0D0E0F10)


def library(status: int = 0) -> Any:
    def uuid_of(room: Any, device: ctypes.c_int) -> int:
        room[:] = UUID.bytes
        return status

    def version(room: Any) -> int:
        room._obj.value = 13020
        return status

    return SimpleNamespace(cuDeviceGetUuid_v2=uuid_of, cuDriverGetVersion=version)


def test_the_cpu_has_none() -> None:
    assert device_identity(None) is None


def test_gpu_driver_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, PlayedDriver())
    monkeypatch.setattr(driver, "driver_library", library)
    texts = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\nGCC 12.3"}
    monkeypatch.setattr(identity, "_text", lambda file: texts.get(str(file), ""))
    found = device_identity(1)
    assert found is not None and found.gpu.endswith(f" {UUID}") and found.driver == "570.86.15"
    assert found.machine == machine_name()
    texts.clear()
    found = device_identity(1)
    assert found is not None and found.driver == "for CUDA 13.2"


def test_a_driver_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, PlayedDriver())
    for answer in (lambda: library(status=1), SimpleNamespace, lambda: ctypes.CDLL("no-such-library.so")):
        monkeypatch.setattr(driver, "driver_library", answer)
        assert device_identity(0) is None
    assert device_identity(7) is None


def test_the_machine_by_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/cpuinfo": "processor\t: 0\nmodel name\t: A Processor @ 2 GHz\n", "/sys/class/dmi/id/product_name": "KVM\n"}
    monkeypatch.setattr(identity, "_text", lambda file: texts.get(str(file), ""))
    monkeypatch.setattr(identity, "available_cores", lambda: 16)
    assert machine_name() == "A Processor @ 2 GHz, 16 cores, KVM"
    texts.clear()
    assert machine_name().endswith("16 cores")


@pytest.mark.gpu
def test_of_a_real_device() -> None:
    found = device_identity(0)
    assert found is not None and found == device_identity(0) and driver.device_info(0).name in found.gpu
