"""A program of ``torch.export`` with our lookups in it, loaded to be served (``frontends/_program.py``).

Inputs have the names of the arguments of ``forward``; an argument that is a dict, list or tuple gives one for each tensor in
it, ``argument.key``. A single output is called ``output``; those of a dict have its keys, those of a tuple are ``output.0``,
``output.1``, ...
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hps_numba.errors import ConfigError, HpsError, ModelFileError
from hps_numba.frontends._program import Program, ProgramError, ProgramTensor, ServedQueries

__all__ = ["load_program"]

_GUARD = "Guard failed: "  # how Torch says that inputs break what was said at the export
_LARGEST = (1 << 31) - 1
_OURS = "hps_numba::"


def load_program(path: Path, queries: ServedQueries) -> Program:
    """The program in a ``.pt2`` file; it runs on the devices that it was exported for.

    Raises:
        ModelFileError: the file cannot be read.   ConfigError: it takes or gives what is no tensor; otherwise as ``point`` of
        ``ServedQueries``.
    """
    if not zipfile.is_zipfile(path):  # Torch would log a traceback
        got = "another file" if path.is_file() else "none"
        raise ModelFileError(f"{path}: expected a program of torch.export, got {got}")
    try:
        exported = torch.export.load(path)
    except Exception as problem:  # of zip, JSON, Torch or what the file holds
        line = str(problem).partition("\n")[0]
        raise ModelFileError(
            f"{path}: expected a program of torch.export, got {type(problem).__name__}: {line:.300}"
        ) from problem
    _point_lookups(exported, queries)
    return _TorchProgram(exported, path, tuple(dict.fromkeys(table.model for table in queries.tables)))


def _point_lookups(exported: Any, queries: ServedQueries) -> None:
    for graph_module in exported.graph_module.modules():
        if not isinstance(graph_module, torch.fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if node.op == "call_function" and schema is not None and schema.name.startswith(_OURS):
                names = [argument.name for argument in schema.arguments]
                if "request" in names:
                    _point(node, names.index("request"), queries)
        graph_module.recompile()


def _point(node: Any, at: int, queries: ServedQueries) -> None:
    if "request" in node.kwargs:
        node.kwargs = {**node.kwargs, "request": queries.point(node.kwargs["request"])}
    else:
        node.args = (*node.args[:at], queries.point(node.args[at]), *node.args[at + 1 :])


class _TorchProgram(Program):
    platform = "pytorch_export"

    def __init__(self, exported: Any, path: Path, models: tuple[str, ...]) -> None:
        self.models = models
        placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        given = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
        self._in_spec = exported.call_spec.in_spec
        self._leaves: list[Any] = []  # what the program is called with: names of inputs, and constants
        self._devices: dict[str, Any] = {}
        inputs = []
        for name, argument in zip(_input_names(exported, given), given, strict=True):
            value = placeholders[argument.name].meta["val"] if argument.name in placeholders else None
            if isinstance(value, torch.Tensor):
                inputs.append(_tensor_of(name, value, f"{path}: input"))
                self._devices[name] = value.device
                self._leaves.append(_Input(name))
            elif hasattr(argument, "value"):
                self._leaves.append(argument.value)
            else:
                raise ConfigError(f"{path}: input {name}: expected a tensor, got {type(argument).__name__}")
        self.inputs = tuple(inputs)
        self._out_spec = exported.call_spec.out_spec
        self.outputs = _outputs_of(exported, self._out_spec, path)
        self.bounds = {str(symbol): _bounds_of(limits) for symbol, limits in exported.range_constraints.items()}
        firsts = {tensor.shape[:1] for tensor in (*self.inputs, *self.outputs)}
        self.batch = len(firsts) == 1 and all(first and isinstance(first[0], str) for first in firsts)
        self._module = exported.module()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See ``Program``."""
        leaves = [self._to_torch(inputs, leaf.name) if isinstance(leaf, _Input) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        try:
            with torch.inference_mode():
                found = pytree.tree_leaves(self._module(*args, **kwargs))
                return {spec.name: _to_numpy(tensor) for spec, tensor in zip(self.outputs, found, strict=True)}
        except HpsError:
            raise
        except Exception as problem:
            if isinstance(problem, AssertionError) and str(problem).startswith(_GUARD):
                expected = str(problem).removeprefix(_GUARD).partition("\n")[0]
                raise ConfigError(f"inputs: expected {expected:.300}, got others") from problem
            raise ProgramError from problem

    def _to_torch(self, inputs: Mapping[str, np.ndarray], name: str) -> torch.Tensor:
        array = inputs[name]
        if not array.flags.writeable:  # Torch has no tensors that are read-only
            array = array.copy()
        return torch.from_numpy(array).to(self._devices[name])


class _Input:
    """The place of an input among what a program is called with."""

    def __init__(self, name: str) -> None:
        self.name = name


def _input_names(exported: Any, given: list[Any]) -> list[str]:
    """The names of all leaves of the arguments, flattened."""
    spec, fallback = exported.call_spec.in_spec, [argument.name for argument in given]
    signature = exported.module_call_graph[0].signature
    arguments = getattr(signature, "forward_arg_names", None)  # since Torch 2.4
    if arguments is None:
        return fallback
    whole = pytree.tree_unflatten(fallback, spec)
    names = []
    for path, _ in pytree.tree_flatten_with_path(whole)[0]:
        which, first, *rest = (_key_of(part) for part in path)
        head = arguments[first] if which == 0 else first
        names.append(".".join(map(str, (head, *rest))))
    return names if len(set(names)) == len(names) else fallback


def _key_of(part: Any) -> Any:
    """The key, index or name by which a part of a pytree is reached."""
    return next(getattr(part, name) for name in ("key", "idx", "name") if hasattr(part, name))


def _outputs_of(exported: Any, spec: Any, path: Path) -> tuple[ProgramTensor, ...]:
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    arguments = [output.arg for output in exported.graph_signature.output_specs if output.kind.name == "USER_OUTPUT"]
    whole = pytree.tree_unflatten([getattr(argument, "name", None) for argument in arguments], spec)
    outputs = []
    for parts, node in pytree.tree_flatten_with_path(whole)[0]:
        keys = [str(_key_of(part)) for part in parts]
        if not parts or not isinstance(whole, Mapping):
            keys = ["output", *keys]
        value = values.get(node)
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{path}: output {'.'.join(keys)}: expected a tensor, got {type(value).__name__}")
        outputs.append(_tensor_of(".".join(keys), value, f"{path}: output"))
    return tuple(outputs)


def _tensor_of(name: str, value: torch.Tensor, place: str) -> ProgramTensor:
    kind = str(value.dtype).removeprefix("torch.")
    if kind == "bfloat16" and place.endswith("output"):
        kind = "float32"  # as it is answered
    try:
        dtype = np.dtype(kind)
    except TypeError as problem:
        raise ConfigError(f"{place} {name}: expected a dtype that NumPy has, got {kind}") from problem
    return ProgramTensor(name, dtype, tuple(size if isinstance(size, int) else str(size) for size in value.shape))


def _bounds_of(limits: Any) -> tuple[int, int]:
    """Of a range of Torch, whose ends may be infinite."""
    least, most = (int(end) if isinstance(end, int) or end.is_Integer else None for end in (limits.lower, limits.upper))
    return max(least or 0, 0), _LARGEST if most is None else min(most, _LARGEST)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
