"""Whole models: programs from files whose lookup layers ask the server that serves, so that clients send ids and get scores.

The rows are those of the server, as they change. A new version of a model may bring a new dense part: then the program and the
rows switch in one moment, and no answer mixes two versions.

A program is code: it can read and write files. So it is the operator who names it when the server starts, and a message on a
bus can only name others in the same folder.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.config.messages import show
from hps_numba.errors import ClosedError, ConfigError, VersionError
from hps_numba.frontends._program import Program, ProgramError, ProgramTensor, ServedQueries
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import DATATYPES, InferenceRequest, InferenceResponse, TensorSpec
from hps_numba.server.hps import HPS

__all__ = ["ProgramModel", "open_program"]

log = logging.getLogger(__name__)
_DATATYPES = {dtype: name for name, dtype in DATATYPES.items()}
_SAVED_MODEL = "saved_model.pb"


def open_program(name: str, path: str | Path, server: HPS, *, signature: str = "") -> ProgramModel:
    """Load a program, and serve it with the rows of a server.

    Args:
        name: by which clients ask for it.
        path: of a ``.pt2`` file (``torch.export``), a ``.keras`` file or the folder of a SavedModel.
        server: has to have the tables that the program looks up, by the names of their models.
        signature: of a SavedModel; empty: ``serving_default``.

    Raises:
        ModelFileError: the program cannot be read.
        ConfigError: the path is of something else, its framework is not installed, or the server lacks one of its tables.
    """
    return ProgramModel(name, Path(path), server, signature)


def _load(path: Path, server: HPS, signature: str) -> Program:
    if path.suffix == ".pt2":
        framework = "torch"
    elif path.suffix == ".keras" or (path / _SAVED_MODEL).is_file():
        framework = "tensorflow"
    else:
        raise ConfigError(f"{path}: expected a .pt2 file, a .keras file or the folder of a SavedModel")
    try:
        loader = importlib.import_module(f"hps_numba.frontends.{framework}.program")
    except ImportError as problem:
        raise ConfigError(
            f'{path}: expected {framework}, which is not installed: pip install "hps-numba[{framework}]"'
        ) from problem
    options = {"signature": signature} if framework == "tensorflow" else {}
    program: Program = loader.load_program(path, ServedQueries(server, str(path)), **options)
    return program


class ProgramModel(InferenceModel):
    """A program that answers requests; see ``open_program``.

    ``max_batch_size`` is the smallest ``max_batch_size`` of the models that it looks up in, and of what it was exported for.
    """

    def __init__(self, name: str, path: Path, server: HPS, signature: str = "") -> None:
        self.name = name
        self._server, self._signature = server, signature
        self._folder = path.resolve().parent
        self._turn = threading.Lock()
        self._closed = False
        stamp = _stamp_of(path)
        self._program = self._load(path)
        self._files: dict[tuple[str, int], tuple[Path, object]] = {}  # of versions of models: their program's file, of when
        self._file = (path, stamp)
        self.platform = self._program.platform
        self._inputs = {tensor.name: tensor for tensor in self._program.inputs}
        self._bounds = self._program.bounds  # those of later programs name sizes in another way
        self._specs = tuple(map(_spec_of, self._program.inputs)), tuple(map(_spec_of, self._program.outputs))
        self.max_batch_size = self._largest_batch() if self._program.batch else 0
        self._followed: dict[str, tuple[object, Callable[[], None]]] = {}
        self._follow()

    def _load(self, path: Path) -> Program:
        program = _load(path, self._server, self._signature)
        for tensor in (*program.inputs, *program.outputs):
            if tensor.dtype not in _DATATYPES:
                expected = ", ".join(map(str, _DATATYPES))
                raise ConfigError(f"{path}: {tensor.name}: expected one of {expected}, got {tensor.dtype}")
        return program

    def _largest_batch(self) -> int:
        (symbol,) = {tensor.shape[0] for tensor in self._program.inputs}
        sizes = [entry.max_batch_size for entry in self._server.config.models if entry.model in self._program.models]
        bounds = self._bounds.get(str(symbol))
        return min([*sizes, *([] if bounds is None else [bounds[1]])], default=0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Those of the program, all of them needed."""
        return self._specs[0]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Those of the program."""
        return self._specs[1]

    def versions(self) -> tuple[str, ...]:
        """The version in force of the model whose rows it looks up; of several: theirs, with points between; of none: 1."""
        if self._closed or not set(self._program.models) <= set(self._server.models):
            return ()
        self._follow()
        return (_joined(self._server.model_version(model) for model in self._program.models),)

    def output_bytes(self, request: InferenceRequest) -> int:
        """Bytes of the outputs, where only the number of samples varies; otherwise 0."""
        shapes = [_shape_of(tensor)[1:] for tensor in self._program.outputs]
        if not self._program.batch or any(-1 in shape for shape in shapes):
            return 0
        samples = max((len(array) for array in request.inputs.values() if array.ndim), default=0)
        return samples * sum(math.prod(shape) * tensor.dtype.itemsize for shape, tensor in zip(shapes, self._program.outputs))

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Run the program, with rows and dense part of one version.

        Raises:
            InferenceError: the inputs are wrong (400), or the code of the program failed (500).
            VersionError: another version is in force.   Otherwise as ``HPS.lookup``.
        """
        if self._closed:
            raise ClosedError(f"model {self.name!r} is closed")
        self._follow()
        self._check(request)
        outputs, version = self._run(request.inputs, self._program.models)
        if request.version and request.version != version:
            raise VersionError(f"version: expected {version}, which model {self.name!r} has, got {request.version[:40]!r}")
        if request.outputs:
            outputs = {name: outputs[name] for name in request.outputs}
        return InferenceResponse(self.name, version, outputs, request.id)

    def _run(self, inputs: Mapping[str, np.ndarray], models: tuple[str, ...]) -> tuple[Mapping[str, np.ndarray], str]:
        """Outputs, and the version that they are of."""
        numbers: dict[str, int] = {}

        def read(left: tuple[str, ...]) -> Mapping[str, np.ndarray]:
            if not left:
                return self._program.run(inputs)
            outputs, numbers[left[0]] = self._server.direct.read_one_version(left[0], lambda: read(left[1:]))
            return outputs

        try:
            outputs = read(models)
        except ProgramError as problem:
            cause = problem.__cause__
            log.error("model %r: its program failed", self.name, exc_info=cause)
            told = f"model {self.name!r}: its program failed with {type(cause).__name__}; the log of the server says more"
            raise InferenceError(500, told) from problem
        return outputs, _joined(numbers[model] for model in models)

    # -- what is asked ---------------------------------------------------------------------

    def _check(self, request: InferenceRequest) -> None:
        for name in request.inputs:
            if name not in self._inputs:
                raise InferenceError(400, f"inputs: expected {', '.join(self._inputs):.500}, got {name[:100]!r}")
        known = [spec.name for spec in self._specs[1]]
        for name in request.outputs:
            if name not in known:
                raise InferenceError(400, f"outputs: expected some of {', '.join(known):.500}, got {name[:100]!r}")
        sizes: dict[str, int] = {}
        for name, tensor in self._inputs.items():
            array = request.inputs.get(name)
            if array is None:
                raise InferenceError(400, f"inputs: expected {', '.join(self._inputs):.500}, got none of {name!r}")
            if array.dtype != tensor.dtype:
                raise InferenceError(400, f"{name}: expected {_DATATYPES[tensor.dtype]}, got {array.dtype}")
            self._check_shape(array, tensor, sizes)
            if self.max_batch_size and len(array) > self.max_batch_size:
                raise InferenceError(400, f"{name}: expected at most {self.max_batch_size} samples, got {len(array)}")

    def _check_shape(self, array: np.ndarray, tensor: ProgramTensor, sizes: dict[str, int]) -> None:
        """``sizes``: those that vary, as far as other inputs have told them."""
        fits = array.ndim == len(tensor.shape)
        for got, expected in zip(array.shape, tensor.shape) if fits else ():
            if isinstance(expected, int):
                fits = fits and got == expected
            elif expected:
                if sizes.setdefault(expected, got) != got:
                    shape = list(array.shape)
                    raise InferenceError(
                        400, f"{tensor.name}: expected {sizes[expected]}, as other inputs have, got shape {shape}"
                    )
                least, most = self._bounds.get(expected, (0, got))
                if not least <= got <= most:
                    raise InferenceError(400, f"{tensor.name}: expected {least} to {most} along an axis, got {got}")
        if not fits:
            raise InferenceError(400, f"{tensor.name}: expected shape {list(_shape_of(tensor))}, got {list(array.shape)}")

    # -- new versions ---------------------------------------------------------------------

    def _follow(self) -> None:
        """Be told of new versions; again if a model was unloaded and loaded."""
        for model in self._program.models:
            there = self._followed.get(model)
            if there is not None and there[0] is self._server.direct.loaded(model):
                continue
            with self._turn:
                loaded = self._server.direct.loaded(model)
                there = self._followed.get(model)
                if there is None or there[0] is not loaded:
                    self._followed[model] = (loaded, self._server.on_version(partial(self._on_version, model), model))

    def _on_version(self, model: str, version: int, manifest: Mapping[str, Any]) -> Callable[[], None] | None:
        """Load the dense part that a version brings, and say how to switch to it."""
        dense = manifest.get("dense")
        known, before = self._file, (model, self._server.model_version(model))
        path = self._files.get((model, version), known)[0] if dense is None else self._place_of(dense)
        now = _stamp_of(path)
        files = {before: known, (model, version): (path, now)}  # a model can go back by one version
        if dense is None and known == (path, now):
            program = self._program
        else:
            program = self._load(path)
            self._check_same(program, path)

        def switch() -> None:
            others = {key: file for key, file in self._files.items() if key[0] != model}
            self._program, self._file, self._files = program, (path, now), others | files

        return switch

    def _place_of(self, dense: Any) -> Path:
        """Where the program of a version is, by what its message says.

        Raises:
            ConfigError: outside of the folder of this program.
        """
        try:
            path = (self._folder / str(dense)).resolve()
        except (OSError, ValueError, RuntimeError) as problem:
            raise ConfigError(f"dense: expected a path, got {show(dense)}") from problem
        if self._folder not in path.parents:
            raise ConfigError(
                f"dense: expected a program in {self._folder}, where that of model {self.name!r} is, got {show(dense)}"
            )
        return path

    def _check_same(self, program: Program, path: Path) -> None:
        """
        Raises:
            ConfigError: clients of the program in force could not use this one.
        """
        old = self._program
        for what, there, new in (("inputs", old.inputs, program.inputs), ("outputs", old.outputs, program.outputs)):
            if [(t.name, t.dtype, _shape_of(t)) for t in there] != [(t.name, t.dtype, _shape_of(t)) for t in new]:
                expected = ", ".join(f"{t.name} {t.dtype} {list(_shape_of(t))}" for t in there)
                got = ", ".join(f"{t.name} {t.dtype} {list(_shape_of(t))}" for t in new)
                raise ConfigError(f"{path}: expected the {what} of the program in force ({expected:.500}), got {got:.500}")
        if set(program.models) != set(old.models):
            raise ConfigError(f"{path}: expected tables of models {', '.join(old.models)}, got {', '.join(program.models)}")

    def close(self) -> None:
        """Answer no more, and follow no more versions."""
        self._closed = True
        with self._turn:
            for _, end in self._followed.values():
                end()
            self._followed = {}


def _shape_of(tensor: ProgramTensor) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in tensor.shape)


def _spec_of(tensor: ProgramTensor) -> TensorSpec:
    return TensorSpec(tensor.name, _DATATYPES[tensor.dtype], _shape_of(tensor))


def _joined(numbers: Any) -> str:
    return ".".join(map(str, numbers)) or "1"


def _stamp_of(path: Path) -> object:
    """What changes when a program's file is replaced; None if there is none."""
    file = path / _SAVED_MODEL if path.is_dir() else path
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
