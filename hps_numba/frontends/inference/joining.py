"""Several requests as one: which may be joined, how, and each its own part of the answer.

Requests are joined along the first axis of their inputs. Nothing else of them may differ: names, dtypes and trailing shapes of
inputs, parameters, version, wanted outputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse

__all__ = ["ALONE", "form_of", "joined", "split"]

ALONE = None
"""The form of a request that is joined with no other."""


def form_of(request: InferenceRequest) -> tuple[Hashable, int]:
    """What a request has in common with those that it can be joined with, and how many samples it has.

    ``ALONE``: it has no samples, as its inputs have several first axes, or none.
    """
    sizes = {array.shape[:1] for array in request.inputs.values()}
    if len(sizes) != 1 or sizes == {()}:
        return ALONE, 1
    ((rows,),) = sizes
    inputs = tuple((name, array.dtype.str, array.shape[1:]) for name, array in sorted(request.inputs.items()))
    own = tuple((name, _plain(some)) for name, some in sorted(request.input_parameters.items()))
    return (inputs, _plain(request.parameters), own, request.model, request.version, request.outputs), rows


def _plain(parameters: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Parameters as texts: 1, 1.0 and True are three."""
    return tuple((name, type(value).__name__, repr(value)) for name, value in sorted(parameters.items()))


def joined(requests: Sequence[InferenceRequest]) -> InferenceRequest:
    """One request, without an id, for the samples of all of them, which have one form."""
    first = requests[0]
    if len(requests) == 1:
        return replace(first, id="")
    inputs = {name: np.concatenate([request.inputs[name] for request in requests]) for name in first.inputs}
    return replace(first, inputs=inputs, id="")


def split(answer: InferenceResponse, requests: Sequence[InferenceRequest]) -> list[InferenceResponse]:
    """The part of each request: views of the answer to all; none if an output has not one row for each sample."""
    sizes = [len(next(iter(request.inputs.values()))) for request in requests]
    if not all(array.ndim > 0 and len(array) == sum(sizes) for array in answer.outputs.values()):
        return []
    parts, start = [], 0
    for request, size in zip(requests, sizes, strict=True):
        outputs = {name: array[start : start + size] for name, array in answer.outputs.items()}
        parts.append(replace(answer, outputs=outputs, id=request.id))
        start += size
    return parts
