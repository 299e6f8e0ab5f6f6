"""The paths of system shared memory: regions are registered, shown and forgotten (extension ``system_shared_memory``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.open_inference.answers import Answer, MethodError, json_answer
from hps_numba.frontends.open_inference.calls import Call
from hps_numba.frontends.open_inference.heads import json_object
from hps_numba.frontends.open_inference.limits import Limits

__all__ = ["answer_regions"]


async def answer_regions(call: Call, rest: Sequence[str], regions: SharedRegions, limits: Limits) -> Answer:
    """The answer to a path below ``/v2/systemsharedmemory``.

    Raises:
        InferenceError: 404, no such path or region.   Otherwise as ``SharedRegions``.
    """
    match rest:
        case ["status"] | ["region", _, "status"]:
            if call.method not in ("GET", "HEAD"):
                raise MethodError("GET, HEAD", call.method)
            return json_answer([asdict(one) for one in regions.status("" if rest == ["status"] else rest[1])])
        case ["unregister"] | ["region", _, "register" | "unregister"]:
            if call.method != "POST":
                raise MethodError("POST", call.method)
        case _:
            raise InferenceError(404, f"path: expected one of the Open Inference Protocol, got {'/'.join(call.path)[:200]!r}")
    if b"origin" in call.headers:
        raise InferenceError(403, "Origin: expected none, pages in browsers may not register shared memory")
    body = await call.body(limits)
    if rest[-1] == "unregister":
        regions.unregister("" if len(rest) == 1 else rest[1])
        return json_answer({})
    wanted = json_object(body, "body")
    key, offset, size = wanted.get("key"), wanted.get("offset", 0), wanted.get("byte_size")
    if not isinstance(key, str):
        raise InferenceError(400, f"key: expected the name of a segment, got {type(key).__name__}")
    regions.register(rest[1], key, _number(offset, "offset"), _number(size, "byte_size"))
    return json_answer({})


def _number(value: Any, place: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise InferenceError(400, f"{place}: expected a number of bytes, got {str(value)[:40]!r}")
    return value
