"""``triton_python_backend_utils`` as Triton 2.51 has it under NumPy 2, with its traps, for tests without Triton."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest

__all__ = ["PlayedMetric", "PlayedRequest", "arguments", "play"]

_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes, _rename.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
_ODD = b"used_dlpack"  # how the backend calls a capsule that it took


class Capsule:
    """A capsule as NumPy takes it."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **more: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Tensor:
    """An output made from an array has other values; ``as_numpy`` of an input is wrong."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self.array = name, np.full(array.shape, 77, array.dtype)

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> Tensor:
        made = cls(name, np.empty(0))
        made.array = np.from_dlpack(Capsule(capsule))
        if not made.array.size:
            raise RuntimeError("DLPack tensor is not contiguous.")
        _rename(capsule, _ODD)
        return made

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        raise AssertionError("as_numpy gives wrong values with NumPy 2")

    def __dlpack__(self, **more: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class PlayedRequest:
    """A request with inputs by name; without ``outputs`` all of the model are wanted, as Triton says it."""

    def __init__(
        self, inputs: Mapping[str, Any], every: Iterable[str], outputs: Iterable[str] | None = None, **parameters: Any
    ) -> None:
        self._tensors = []
        for name, value in inputs.items():
            tensor = Tensor(name, np.empty(0))
            tensor.array = np.asarray(value)
            self._tensors.append(tensor)
        self._outputs = set(every if outputs is None else outputs)
        self._parameters = parameters

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def request_id(self) -> str:
        return "7"

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def requested_output_names(self) -> set[str]:
        return self._outputs


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self.message, self.code = message, code


class Response:
    """As in 2.51."""

    def __init__(self, output_tensors: Iterable[Tensor] = (), error: TritonError | None = None) -> None:
        """__init__(self, output_tensors: List[Tensor] = [], error: TritonError = None) -> None"""
        self.outputs = {tensor.name(): tensor.array for tensor in output_tensors}
        self.error = error
        self.parameters: Any = None


class ResponseWithParameters(Response):
    """As in later versions."""

    def __init__(self, output_tensors: Iterable[Tensor] = (), error: TritonError | None = None, parameters: Any = None) -> None:
        """__init__(self, output_tensors: List[Tensor] = [], error: TritonError = None, parameters: object = None) -> None"""
        super().__init__(output_tensors, error)
        self.parameters = parameters


@dataclass
class PlayedMetric:
    labels: dict[str, str]
    value: float = 0.0
    calls: int = 0

    def increment(self, by: float) -> None:
        assert by >= 0
        self.set(self.value + by)

    def set(self, value: float) -> None:
        self.value, self.calls = value, self.calls + 1


@dataclass
class PlayedFamilies:
    """``MetricFamily``; ``made`` has its families by name, each with its metrics."""

    made: dict[str, list[PlayedMetric]] = field(default_factory=dict)
    refusal: Exception | None = None
    COUNTER: str = "counter"
    GAUGE: str = "gauge"

    def __call__(self, *, name: str, description: str, kind: str) -> Any:
        if self.refusal is not None:
            raise self.refusal
        assert name not in self.made and description and (kind == "counter") == name.endswith("_total")
        metrics = self.made[name] = []

        class Family:
            def Metric(self, *, labels: dict[str, str]) -> PlayedMetric:
                metrics.append(PlayedMetric(dict(labels)))
                return metrics[-1]

        return Family()

    def value(self, name: str, **labels: str) -> float:
        """What was reported for some labels."""
        (found,) = [metric for metric in self.made[name] if labels.items() <= metric.labels.items()]
        return found.value


def play(monkeypatch: pytest.MonkeyPatch, *, with_parameters: bool = False) -> Any:
    """Put the module where models import it from, for the test."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError = Tensor, TritonError
    module.InferenceResponse = ResponseWithParameters if with_parameters else Response
    module.MetricFamily = PlayedFamilies()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def arguments(name: str = "m", folder: str = "", version: str = "1", **parameters: str) -> dict[str, str]:
    """What Triton hands to ``initialize``."""
    config = {"name": name, "parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    return {
        "model_config": json.dumps(config),
        "model_name": name,
        "model_version": version,
        "model_repository": folder,
        "model_instance_name": f"{name}_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }
