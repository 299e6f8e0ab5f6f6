"""tritonclient over HTTP or gRPC, with arrays by name in and out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from support.waiting import HANG_SECONDS

__all__ = ["TritonClient"]

_DATATYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}


class TritonClient:
    """One connection.

    Attributes:
        raw: tritonclient's own client.   module: ``tritonclient.http`` or ``tritonclient.grpc``.
        failure: what it raises for an error of the server.
    """

    def __init__(self, protocol: str, address: str) -> None:
        self.module: Any = pytest.importorskip(f"tritonclient.{protocol}")
        self.failure: Any = pytest.importorskip("tritonclient.utils").InferenceServerException
        limits = {"connection_timeout": HANG_SECONDS, "network_timeout": HANG_SECONDS} if protocol == "http" else {}
        self.raw = self.module.InferenceServerClient(address, **limits)

    def ask(
        self, model: str, inputs: Mapping[str, Any], outputs: Iterable[str] = (), *, version: str = "", **parameters: Any
    ) -> dict[str, np.ndarray]:
        """All outputs of an answer by name; the tensors travel in binary."""
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        given = [self.module.InferInput(name, array.shape, _DATATYPES[str(array.dtype)]) for name, array in arrays.items()]
        for tensor, array in zip(given, arrays.values(), strict=True):
            tensor.set_data_from_numpy(array)
        wanted = [self.module.InferRequestedOutput(name) for name in outputs] or None
        result = self.raw.infer(model, given, version, outputs=wanted, parameters=parameters or None)
        response = result.get_response()
        told = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [one["name"] if isinstance(one, dict) else one.name for one in told]
        return {name: result.as_numpy(name) for name in names}

    def error(self, model: str, inputs: Mapping[str, Any], outputs: Iterable[str] = (), **parameters: Any) -> tuple[str, str]:
        """Status and message of the error that a request gets; statuses of gRPC as the HTTP ones that they stand for."""
        with pytest.raises(self.failure) as caught:
            self.ask(model, inputs, outputs, **parameters)
        status = str(caught.value.status()).removeprefix("StatusCode.")
        return {"INVALID_ARGUMENT": "400", "NOT_FOUND": "404", "UNAVAILABLE": "503"}.get(status, status), caught.value.message()

    def close(self) -> None:
        self.raw.close()
