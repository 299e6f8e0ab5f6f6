"""A dense Torch model (``torch.export``, a ``.pt2`` file) in Triton's Python backend: a step of an ensemble behind the tables.

It computes on the CPU. On a GPU, Triton's own backends for Torch, TensorRT and ONNX take its place, with the same tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import InferenceResponse, TensorSpec
from hps_numba.frontends.triton.python_backend import array_of, error_response, response_of

__all__ = ["PROGRAM", "DenseProgram", "TritonPythonModel"]

#: name of the program in the folder of a version
PROGRAM = "model.pt2"
_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}


class DenseProgram:
    """An exported program whose arguments and results are tensors.

    Attributes:
        inputs: its arguments, by their names in ``forward``.   outputs: its results: ``OUTPUT0``, ``OUTPUT1``, ...

    Raises:
        ConfigError: it cannot be read, or takes or returns something else.
    """

    def __init__(self, path: Path) -> None:
        import torch

        if not path.is_file():
            raise ConfigError(f"{path}: expected a file saved by torch.export.save, got none")
        if not zipfile.is_zipfile(path):  # Torch would log a traceback
            raise ConfigError(f"{path}: expected a program saved by torch.export.save, got another file")
        try:
            looks_up = _looks_up(path)
            program = None if looks_up else torch.export.load(path)
        except Exception as problem:
            raise ConfigError(f"{path}: expected a program saved by torch.export.save: {problem}") from problem
        if program is None:
            raise ConfigError(f"{path}: expected the dense part alone, which takes rows, got a program that looks up rows")
        nodes = {node.name: node for node in program.graph.nodes}
        results = next(node for node in program.graph.nodes if node.op == "output").args[0]
        by_name = {getattr(node, "name", ""): node for node in results}
        signature = program.graph_signature
        self.inputs = tuple(_spec(path, name, nodes.get(str(name))) for name in signature.user_inputs)
        self.outputs = tuple(_spec(path, f"OUTPUT{i}", by_name.get(str(name))) for i, name in enumerate(signature.user_outputs))
        self._torch, self._module = torch, program.module()

    def __call__(self, tensors: Mapping[str, Any]) -> list[Any]:
        """Compute the results, NumPy arrays, from the arguments by name."""
        torch = self._torch
        with torch.inference_mode():
            results = self._module(*(torch.from_dlpack(tensors[spec.name]) for spec in self.inputs))
        return [result.numpy() for result in ([results] if torch.is_tensor(results) else list(results))]


def _looks_up(path: Path) -> bool:
    """Whether a program calls operators of this package: told by the text of its graph, as Torch would log tracebacks."""
    with zipfile.ZipFile(path) as archive:
        graphs = (name for name in archive.namelist() if name.endswith(".json"))
        return any(b"torch.ops.hps_numba." in archive.read(name) for name in graphs)


def _spec(path: Path, name: Any, node: Any) -> TensorSpec:
    value: Any = None if node is None else node.meta.get("val")
    datatype = _DATATYPES.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
    if datatype is None:
        raise ConfigError(f"{path}: {name}: expected a tensor of one of {', '.join(_DATATYPES)}, got {value!r}")
    return TensorSpec(str(name), datatype, tuple(size if isinstance(size, int) else -1 for size in value.shape))


class TritonPythonModel:
    """Runs the program in the folder of its version.

    Thread safety: Triton calls one method at a time.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the program.

        Raises:
            ConfigError: there is none, or it is not of tensors.
        """
        self._name, self._version = args["model_name"], args["model_version"]
        self._program = DenseProgram(Path(args["model_repository"]) / self._version / PROGRAM)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests; one that is wrong gets an error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            results = self._program({tensor.name(): array_of(tensor) for tensor in request.inputs()})
            outputs = {spec.name: result for spec, result in zip(self._program.outputs, results, strict=True)}
            answer = InferenceResponse(self._name, self._version, outputs)
            return response_of(answer, request.requested_output_names())
        except Exception as problem:  # whatever the program raises about what it is given
            return error_response(InferenceError(400, f"model {self._name}: {type(problem).__name__}: {problem}"))
