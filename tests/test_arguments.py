"""Wrong arguments of every public function: taken, or refused by an error of this package that says what was expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.zoo import Foreign, parameters_of, refusals

import hps_numba
from hps_numba import simulate

DIM = 3
TRACE = np.arange(200) % 50


class Lru:
    @staticmethod
    def first(now, count):  # type: ignore[no-untyped-def]
        return now

    @staticmethod
    def touch(score, now, count):  # type: ignore[no-untyped-def]
        return now


RESULT = simulate.run(TRACE, ["lru"], [8], progress=False)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(hps_numba, name) for name in hps_numba.__all__ if inspect.isfunction(getattr(hps_numba, name))},
    **{name: getattr(simulate, name) for name in simulate.__all__ if inspect.isfunction(getattr(simulate, name))},
    "Simulation.select": RESULT.select,
    "Simulation.write_json": RESULT.write_json,
    "Simulation.write_csv": RESULT.write_csv,
}
PARAMETERS = parameters_of(FUNCTIONS)
IS_PATH = {"path", "src", "dst", "source", "trace", "folder", "beside"}


def good(name: str, folder: Path, workshop: Workshop) -> dict[str, Any]:
    """Arguments that are taken, but for those that have a default."""
    chunk = (np.arange(2), np.zeros((2, DIM), np.float32))
    model = folder / "good.model"
    if not model.exists():
        hps_numba.write_model(model, DIM, [chunk])
    entry = workshop.model((range(3), DIM))
    found: dict[str, dict[str, Any]] = {
        "as_policy": {"kind": Lru},
        "convert_model": {"src": model, "dst": folder / "copy.h5", "overwrite": True},
        "generate_model": {"path": folder / "made.model", "rows": 4, "dim": DIM, "overwrite": True},
        "load_policy": {"name": "lru"},
        "make_plan": {"config": hps_numba.read_config({"supportlonglong": True, "models": [entry]})},
        "open_model": {"path": model},
        "policy_with": {"kind": Lru},
        "read_config": {"source": {"supportlonglong": True, "models": [entry]}},
        "write_model": {"path": folder / "new.model", "dim": DIM, "chunks": [chunk], "overwrite": True},
        "run": {"trace": TRACE, "policies": ["lru"], "sizes": [8], "progress": False},
        "advise": {"trace": TRACE, "target_hit_rate": 0.5, "policies": ["lru"], "progress": False},
        "open_trace": {"source": TRACE},
        "write_page": {"simulation": RESULT, "path": folder / "page.html"},
        "write_plot": {"simulation": RESULT, "path": folder / "plot.png"},
        "Simulation.write_json": {"path": folder / "r.json"},
        "Simulation.write_csv": {"path": folder / "r.csv"},
    }
    return found.get(name, {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_good_arguments_are_good(name: str, tmp_path: Path, workshop: Workshop) -> None:
    used(name, FUNCTIONS[name](**good(name, tmp_path, workshop)))


def used(name: str, answer: Any) -> None:
    """What callers do next."""
    if name == "open_model":
        answer.close()
    elif name == "open_trace":
        answer.keys()


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=[".".join(pair) for pair in PARAMETERS])
def test_a_wrong_argument_is_a_typed_error(
    name: str, parameter: str, tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    given = good(name, tmp_path, workshop)

    def call(value: Any) -> None:
        if (parameter in ("on_progress", "on_loss") and callable(value)) or (
            parameter == "chunks" and isinstance(value, Foreign)
        ):
            return  # what the caller's own code raises passes
        used(name, FUNCTIONS[name](**{**given, parameter: value}))

    refused = [error for _, error in refusals(call, paths=parameter in IS_PATH) if error is not None]
    assert all(10 < len(str(error)) < 2000 for error in refused)
    assert len(refused) > 14 or (name, parameter) == ("open_model", "dim")
