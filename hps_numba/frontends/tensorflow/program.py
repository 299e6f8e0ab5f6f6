"""A SavedModel or Keras model with our lookups in it, loaded to be served (``frontends/_program.py``).

Inputs and outputs have the names of a signature of the SavedModel, ``serving_default``. A ``.keras`` file is exported as a
SavedModel when it is loaded, so it has the names that ``model.export`` gives; an input without a name is ``input_0``,
``input_1``, ... there, as Keras numbers them differently each time.

The graph of a SavedModel cannot be changed once it is loaded. So a copy of its graph, whose lookups ask the server that serves,
is written to a temporary folder beside links to the variables, and loaded from there.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from hps_numba import errors
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, HpsError, ModelFileError
from hps_numba.frontends._program import Program, ProgramError, ProgramTensor, ServedQueries
from hps_numba.frontends.tensorflow.keras_version import IS_KERAS_2, keras
from hps_numba.frontends.tensorflow.operator import INIT_TOKEN, LOOKUP_TOKEN

__all__ = ["load_program"]

_GRAPH = "saved_model.pb"
_CALLS = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
_UNNAMED = re.compile(r"keras_tensor(_\d+)?$")
_OURS = re.compile(r"\b([A-Z]\w+): (.*)")  # how TensorFlow tells an error of Python
_DEFAULT_SIGNATURE = "serving_default"


def load_program(path: Path, queries: ServedQueries, signature: str = "") -> Program:
    """The program in a SavedModel's folder or a ``.keras`` file.

    Args:
        signature: of the SavedModel; empty: ``serving_default``.

    Raises:
        ModelFileError: it cannot be read.   ConfigError: it has no such signature, or takes or gives what is no tensor of
        numbers; otherwise as ``point`` of ``ServedQueries``.
    """
    folder = tempfile.mkdtemp(prefix="hps_numba_program_")
    try:
        source = _exported(path, Path(folder) / "exported") if path.suffix == ".keras" else path
        served = _pointed(source, Path(folder) / "served", queries)
        loaded = _read(path, "a SavedModel", lambda: tf.saved_model.load(str(served)))
        models = tuple(dict.fromkeys(table.model for table in queries.tables))
        program = _TensorFlowProgram(loaded, signature or _DEFAULT_SIGNATURE, path, models)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    program.folder = Path(folder)
    weakref.finalize(program, shutil.rmtree, folder, ignore_errors=True)
    return program


def _read(path: Path, what: str, read: Any) -> Any:
    try:
        return read()
    except HpsError:
        raise
    except Exception as problem:  # of TensorFlow, Keras, protobuf or what the file holds
        line = str(problem).partition("\n")[0]
        raise ModelFileError(f"{path}: expected {what}, got {type(problem).__name__}: {line:.300}") from problem


def _exported(path: Path, folder: Path) -> Path:
    """A Keras model as a SavedModel; a file with code in it (lambdas) is refused."""
    model = _read(path, "a Keras model", lambda: keras.models.load_model(path, compile=False, safe_mode=True))
    options: dict[str, Any] = {} if IS_KERAS_2 else {"verbose": False}
    _read(path, "a Keras model that can be exported", lambda: model.export(str(folder), **options))
    return folder


def _pointed(source: Path, folder: Path, queries: ServedQueries) -> Path:
    """A copy of a SavedModel whose lookups ask the server."""
    saved = saved_model_pb2.SavedModel()
    data = _read(source, f"a SavedModel ({_GRAPH})", lambda: (source / _GRAPH).read_bytes())
    _read(source, f"a SavedModel ({_GRAPH})", lambda: saved.ParseFromString(data))
    for graph in saved.meta_graphs:
        for nodes in (graph.graph_def.node, *(function.node_def for function in graph.graph_def.library.function)):
            _point_lookups(nodes, queries, source)
    folder.mkdir()
    for entry in source.iterdir():
        if entry.name != _GRAPH:
            (folder / entry.name).symlink_to(entry.resolve())
    (folder / _GRAPH).write_bytes(saved.SerializeToString())
    return folder


def _point_lookups(nodes: Iterable[Any], queries: ServedQueries, place: Path) -> None:
    by_name = {node.name: node for node in nodes}
    done: set[str] = set()
    for call in list(by_name.values()):
        token = call.attr["token"].s.decode(errors="replace") if call.op in _CALLS else ""
        if token not in (LOOKUP_TOKEN, INIT_TOKEN):
            continue
        source = by_name.get(call.input[0].partition(":")[0])
        while source is not None and source.op == "Identity":
            source = by_name.get(source.input[0].partition(":")[0])
        if source is None or source.op != "Const":
            raise ConfigError(f"{place}: expected the query of {call.name} as a constant, got another input")
        if source.name not in done:
            done.add(source.name)
            tensor = source.attr["value"].tensor
            point = queries.point if token == LOOKUP_TOKEN else queries.point_start
            tensor.string_val[0] = point(tensor.string_val[0]).encode()


class _TensorFlowProgram(Program):
    platform = "tensorflow_savedmodel"
    folder: Path  # where it lies as long as it lives

    def __init__(self, loaded: Any, signature: str, path: Path, models: tuple[str, ...]) -> None:
        self.models, self.bounds = models, {}
        if signature not in loaded.signatures:
            known = ", ".join(loaded.signatures) or "none"
            raise ConfigError(f"{path}: expected a signature of {known:.300}, got {show(signature)}")
        self._loaded, self._function = loaded, loaded.signatures[signature]
        taken = self._function.structured_input_signature[1]
        unnamed = sorted((name for name in taken if _UNNAMED.match(name)), key=lambda name: (len(name), name))
        shown = {name: f"input_{number}" for number, name in enumerate(unnamed)}
        self._names = {shown.get(name, name): name for name in taken}
        self.inputs = tuple(_tensor_of(name, taken[own], f"{path}: input") for name, own in self._names.items())
        given = self._function.structured_outputs
        self.outputs = tuple(_tensor_of(name, given[name], f"{path}: output") for name in given)
        self.batch = all(tensor.shape[:1] == ("",) for tensor in (*self.inputs, *self.outputs))

    def run(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See ``Program``."""
        try:
            tensors = {own: tf.convert_to_tensor(inputs[name]) for name, own in self._names.items()}
            found = self._function(**tensors)
            return {spec.name: _to_numpy(found[spec.name], spec.dtype) for spec in self.outputs}
        except HpsError:
            raise
        except Exception as problem:
            ours = _error_in(str(problem)) if isinstance(problem, tf.errors.OpError) else None
            if ours is not None:
                raise ours from problem
            raise ProgramError from problem


def _tensor_of(name: str, spec: Any, place: str) -> ProgramTensor:
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        raise ConfigError(f"{place} {name}: expected a tensor of known rank, got {show(spec):.200}")
    dtype = tf.float32 if spec.dtype == tf.bfloat16 and place.endswith("output") else spec.dtype
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool) or dtype == tf.bfloat16 or dtype.is_quantized:
        raise ConfigError(f"{place} {name}: expected numbers, got {dtype.name}")
    return ProgramTensor(name, np.dtype(dtype.as_numpy_dtype), tuple("" if n is None else n for n in spec.shape.as_list()))


def _to_numpy(tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy().astype(dtype, copy=False)).reshape(tensor.shape)


def _error_in(text: str) -> HpsError | None:
    """The error of this package that a lookup in a graph raised, by what TensorFlow made of it."""
    for name, message in _OURS.findall(text):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, HpsError):
            return kind(message.strip())
    return None
