"""Wrong arguments of every public method of a server: a typed error, no hang, and the server still answers (promise 2)."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.zoo import ZOO

import hps_numba
from hps_numba import simulate
from hps_numba.errors import ArrayError, ConfigError, DeviceError, HpsError, UnknownModelError

DIM = 3


METHODS = [name for name, _ in inspect.getmembers(hps_numba.HPS, inspect.isfunction) if not name.startswith("_")]
PARAMETERS = [
    (method, parameter)
    for method in METHODS
    for parameter in inspect.signature(getattr(hps_numba.HPS, method)).parameters
    if parameter != "self"
]
GOOD: dict[str, Any] = {
    "keys": [0, 1],
    "rows": np.zeros((2, DIM), np.float32),
    "model_name": "m",
    "table_id": 0,
    "offsets": [0, 2],
    "change": lambda rows, found: rows,
    "policy": "lru",
    "callback": lambda keys: None,
    "hook": lambda version, manifest: None,
    "out_tensor": np.zeros((2, DIM), np.float32),
}


class Calls:
    """A server, and good arguments for each of its methods."""

    def __init__(self, workshop: Workshop) -> None:
        self.entry = workshop.model((range(9), DIM))
        self.server = workshop.open(self.entry)
        self._folder, self._numbers = workshop.folder, itertools.count()
        self.server.dump(self._folder / "good.bin", "m", 0)
        self.server.replace_model("m")  # so that there is a version to go back to

    def good(self, method: str, parameter: inspect.Parameter) -> Any:
        fresh = f"fresh{next(self._numbers)}"
        if parameter.name == "path":
            name = {"load_dump": "good.bin", "dump": f"{fresh}.bin"}.get(method, f"{fresh}.npy")
            return self._folder / name
        if parameter.name == "model":
            return {**self.entry, "model": fresh}
        if method == "lookup_many" and parameter.name == "keys":
            return [[0, 1]]
        needed = parameter.default is parameter.empty or parameter.name in ("model_name", "policy")
        return GOOD[parameter.name] if needed else parameter.default

    def run(self, method: str, wrong: str | None = None, value: Any = None) -> None:
        """Call a method and end what it begins; afterwards the server has its one model."""
        given = {
            name: value if name == wrong else self.good(method, parameter)
            for name, parameter in inspect.signature(getattr(self.server, method)).parameters.items()
        }
        try:
            answer = getattr(self.server, method)(**given)
            if method in ("locked_table", "replaying"):
                with answer:
                    pass
            elif method == "record_trace":
                answer.close()
            elif method == "on_version":
                answer()
        finally:
            for name in set(self.server.models) - {"m"}:
                self.server.unload_model(name)
            if method != "close" and not self.server.models:
                self.server.load_model(self.entry)


@pytest.fixture
def calls(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    monkeypatch.chdir(workshop.folder)
    yield Calls(workshop)


@pytest.mark.parametrize("method", METHODS)
def test_the_good_arguments_are_good(calls: Calls, method: str) -> None:
    calls.run(method)


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS, ids=[".".join(pair) for pair in PARAMETERS])
def test_a_wrong_argument_is_a_typed_error_and_the_server_lives_on(calls: Calls, method: str, parameter: str) -> None:
    """Each value of the zoo is taken, or refused by an error of this package; ``change`` may raise what it likes."""
    refused = 0
    for value in ZOO.values():
        if method == "read_modify_write" and parameter == "change" and callable(value):
            continue
        try:
            calls.run(method, parameter, value)
        except HpsError as error:
            refused += 1
            assert 10 < len(str(error)) < 2000
    may_be_ignored = {"stream", "drop", "flat", "policy"}  # the stream of keys in host memory, and a decorator for None
    assert refused > len(ZOO) // 2 or (parameter in may_be_ignored and (refused or parameter == "stream"))
    assert_same_bits(calls.server.lookup([7, 8], "m", 0), rows_of([7, 8], DIM))
    assert calls.server.models == ("m",)


@pytest.mark.parametrize("config", ZOO.values(), ids=ZOO)
def test_a_wrong_config_is_a_typed_error(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HpsError):
        hps_numba.HPS(config)


SIMULATED: dict[str, Any] = {"policies": ["lru"], "sizes": [8], "target_hit_rate": 0.5}
SIMULATE = [
    (function, name)
    for function in (simulate.run, simulate.advise)
    for name in ("geometry", "batch", "warmup", "sample", "dim", "row_dtype", "windows", "sizes", "target_hit_rate")
    if name in inspect.signature(function).parameters
]


@pytest.mark.parametrize(("function", "name"), SIMULATE, ids=[f"{f.__name__}.{name}" for f, name in SIMULATE])
def test_a_wrong_setting_of_a_simulation_is_a_typed_error(function: Any, name: str) -> None:
    known = inspect.signature(function).parameters
    given = {key: value for key, value in SIMULATED.items() if key in known}
    refused = 0
    for value in ZOO.values():
        try:
            function(np.arange(200) % 50, **{**given, name: value}, progress=False)
        except HpsError:
            refused += 1
    assert refused > len(ZOO) // 2


def test_arguments_that_are_nearly_right(calls: Calls) -> None:
    server = calls.server
    for table in (True, 0.0, -1, "0", 2**70, [0]):
        with pytest.raises(UnknownModelError, match="table_id: model 'm' has no table"):
            server.lookup([0], "m", table)  # type: ignore[arg-type]
    for device in (False, 0.0, "0", [0], np.zeros(1), -1, 1, 2**70):
        with pytest.raises(DeviceError, match="device_id: "):
            server.lookup([0], "m", 0, device)  # type: ignore[arg-type]
    assert_same_bits(server.lookup([3], "m", np.int64(0), np.int32(0)), rows_of([3], DIM))  # type: ignore[arg-type]
    for norm in ("1", True, np.ones(1), 1j, float("nan"), -1):
        with pytest.raises(ConfigError, match="max_norm: "):
            server.lookup_pooled([0], [0, 1], "m", 0, max_norm=norm)  # type: ignore[arg-type]
    for padding in ("1", True, 1.0, [1]):
        with pytest.raises(ConfigError, match="padding: "):
            server.lookup_pooled([0], [0, 1], "m", 0, padding=padding)  # type: ignore[arg-type]
    for rows in (
        np.zeros((1, DIM + 1), np.float32),
        np.zeros(DIM, np.float32),
        [["a"] * DIM],
        np.zeros((1, DIM), complex),
        None,
    ):
        for write in (server.insert, server.update):
            with pytest.raises(ArrayError, match="rows: "):
                write([0], rows, "m", 0)
    for files in (5, None, [5], [None], b"x", [b"x"], ["a\0b"], {}, [], ["a", "b"]):
        if files is not None:
            with pytest.raises(HpsError, match="sparse_files"):
                server.replace_model("m", files)  # type: ignore[arg-type]
