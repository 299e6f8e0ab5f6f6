"""Ranges of NVTX around calls of a server: on request, from whichever library has them, else a typed error."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop

from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.metrics.nvtx import VARIABLE, open_ranges
from hps_numba.server.lookups import Lookups


class Recorded(ModuleType):
    """A module that notes what it is told; ``names``: of its functions."""

    def __init__(self, push: str, pop: str) -> None:
        super().__init__("recorded")
        self.seen: list[str] = []
        self.depth = 0
        setattr(self, push, self._push)
        setattr(self, pop, self._pop)

    def _push(self, name: str, **options: Any) -> None:
        self.seen.append(name)
        self.depth += 1

    def _pop(self, **options: Any) -> None:
        self.depth -= 1


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded("push_range", "pop_range")
    monkeypatch.setitem(sys.modules, "nvtx", made)
    return made


def model(workshop: Workshop) -> Any:
    return {"models": [workshop.model((range(9), 3))], "volatile_db": {"type": "hash_map"}}


def opened(workshop: Workshop, nvtx: bool | None) -> Any:
    import hps_numba

    server = hps_numba.HPS(model(workshop), nvtx=nvtx)
    workshop.servers.append(server)
    return server


def test_calls_are_ranges(workshop: Workshop, nvtx: Recorded) -> None:
    server = opened(workshop, True)
    assert nvtx.seen == ["load_all"]
    keys = np.arange(3)
    rows = server.lookup(keys, "m", 0)
    server.insert([20], rows[:1], "m", 0)
    server.lookup_many([[1]], "m")
    server.lookup_pooled([1], [0, 1], "m", 0)
    server.refresh("m")
    server.replace_model("m")
    assert nvtx.seen[1:] == ["lookup", "insert", "lookup_many", "lookup_pooled", "refresh", "replace"]
    assert nvtx.depth == 0


def test_a_range_ends_with_an_error(workshop: Workshop, nvtx: Recorded) -> None:
    server = opened(workshop, True)
    with pytest.raises(UnknownModelError):
        server.lookup([1], "none", 0)
    assert (nvtx.seen[-1], nvtx.depth) == ("lookup", 0)


@pytest.mark.parametrize(
    ("asked", "said", "expected"), [(None, "1", True), (None, "0", False), (None, "", False), (False, "1", False)]
)
def test_the_environment_asks_for_servers_that_are_not_told(
    workshop: Workshop, nvtx: Recorded, monkeypatch: pytest.MonkeyPatch, asked: bool | None, said: str, expected: bool
) -> None:
    monkeypatch.setenv(VARIABLE, said)
    opened(workshop, asked).lookup([1], "m", 0)
    assert bool(nvtx.seen) is expected


def test_a_server_that_is_not_asked_has_no_mark(workshop: Workshop) -> None:
    assert type(opened(workshop, None)._lookups) is Lookups


def test_torch_is_asked_where_there_is_no_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = Recorded("range_push", "range_pop")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "torch.cuda", ModuleType("torch.cuda"))
    monkeypatch.setitem(sys.modules, "torch.cuda.nvtx", torch)
    ranges = open_ranges(True)
    assert ranges is not None
    ranges.push("lookup")
    ranges.pop()
    assert (torch.seen[-1], torch.depth) == ("hps_numba.lookup", 0)


def test_without_any_library_the_error_says_what_to_install(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setitem(sys.modules, "torch.cuda.nvtx", None)
    with pytest.raises(ConfigError, match="pip install nvtx"):
        opened(workshop, True)


def test_a_torch_without_cuda_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("NVTX functions not installed")

    torch = Recorded("range_push", "range_pop")
    torch.range_push = fails  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setitem(sys.modules, "torch.cuda.nvtx", torch)
    with pytest.raises(ConfigError, match="pip install nvtx"):
        open_ranges(True)


@pytest.mark.parametrize(("argument", "said", "place"), [("yes", "", "nvtx"), (None, "yes", VARIABLE)])
def test_what_is_neither_yes_nor_no_is_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, argument: Any, said: str, place: str
) -> None:
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(ConfigError, match=place):
        opened(workshop, argument)


def test_the_library_of_nvidia_takes_the_ranges(workshop: Workshop) -> None:
    pytest.importorskip("nvtx", reason="nvtx is not installed")
    assert opened(workshop, True).lookup(np.arange(2), "m", 0).shape == (2, 3)
