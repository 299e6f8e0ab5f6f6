"""Fixtures: small models in HugeCTR's form, servers on them, caches, and the skip of tests that need a GPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from support.factories import ON_BOTH, Workshop, has_cuda_device
from support.services import Service, without_devices

if TYPE_CHECKING:
    from support.cache_bench import Bench

# kernels are compiled on first use, and machines of CI stall: how long an example takes says nothing
hypothesis.settings.register_profile("steady", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("steady")

# a shell that starts pytest in the background makes it ignore Ctrl-C, and with it the interrupts of tests
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_cuda_device():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of colours must not reach the output that tests read."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    yield made
    for server in made.servers:
        server.close()


def bench_on(device: int | None) -> Iterator[Bench]:
    from support.cache_bench import Bench

    made = Bench(device)
    yield made
    made.close()


@pytest.fixture(params=ON_BOTH)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Caches and stores on the CPU backend, and on a device."""
    yield from bench_on(request.param)


@pytest.fixture
def cpu_bench() -> Iterator[Bench]:
    """Caches and stores on the CPU backend only."""
    yield from bench_on(None)


@pytest.fixture(params=ON_BOTH)
def service(request: pytest.FixtureRequest, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    if request.param is None:
        without_devices(monkeypatch)
    yield Service(workshop, request.param)


@pytest.fixture
def on_cpu(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Service:
    without_devices(monkeypatch)
    return Service(workshop, None)
