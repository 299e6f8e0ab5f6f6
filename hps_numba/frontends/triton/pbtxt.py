"""The text of a ``config.pbtxt``: Triton's model configuration as text of protocol buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hps_numba.frontends.inference.tensors import TensorSpec

__all__ = ["Step", "model_text"]


@dataclass(frozen=True)
class Step:
    """One model of an ensemble.

    Attributes:
        model: its name.
        inputs, outputs: name of a tensor of the model -> name in the ensemble.
    """

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def model_text(
    name: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    *,
    max_batch_size: int = 0,
    instances: int = 1,
    parameters: Mapping[str, str] | None = None,
    steps: Sequence[Step] = (),
) -> str:
    """A model of the Python backend or, with ``steps``, an ensemble."""
    kind = 'platform: "ensemble"' if steps else 'backend: "python"'
    lines = [f"name: {_quoted(name)}", kind, f"max_batch_size: {max_batch_size}"]
    lines += [line for spec in inputs for line in _tensor("input", spec)]
    lines += [line for spec in outputs for line in _tensor("output", spec)]
    if steps:
        lines += ["ensemble_scheduling {", *(f"  {line}" for step in steps for line in _step(step)), "}"]
    else:
        lines.append(f"instance_group {{ kind: KIND_CPU count: {instances} }}")
    for key, value in (parameters or {}).items():
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _tensor(what: str, spec: TensorSpec) -> list[str]:
    optional = " optional: true" if spec.optional else ""
    shape = ", ".join(map(str, spec.shape))
    return [f"{what} {{ name: {_quoted(spec.name)} data_type: TYPE_{spec.datatype} dims: [ {shape} ]{optional} }}"]


def _step(step: Step) -> list[str]:
    lines = ["step {", f"  model_name: {_quoted(step.model)}", "  model_version: -1"]
    for what, names in (("input_map", step.inputs), ("output_map", step.outputs)):
        lines += [f"  {what} {{ key: {_quoted(key)} value: {_quoted(value)} }}" for key, value in names.items()]
    return [*lines, "}"]


def _quoted(text: str) -> str:
    """Text in quotes, with what is not plain ASCII as octal bytes of UTF-8."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in (34, 92) else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
