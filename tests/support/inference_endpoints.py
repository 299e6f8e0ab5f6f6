"""Endpoints of the Open Inference Protocol, asked in one way whatever the transport: the client side of ``inference_suite``.

An endpoint is a server and a client of it. ``lacks`` says what of the suite it cannot do, with the reason that a skipped test
shows.
"""

from __future__ import annotations

import http.client
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pytest
from support.waiting import HANG_SECONDS

__all__ = ["Answer", "Endpoint", "OwnClient", "PlainGrpc", "PlainHttp", "Refused", "Tensor", "TritonGrpc", "TritonHttp"]

NAMES = {
    np.dtype(kind): name
    for kind, name in (
        ("bool", "BOOL"),
        *((f"{sign}int{bits}", f"{sign}int{bits}".upper()) for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *((f"float{bits}", f"FP{bits}") for bits in (16, 32, 64)),
    )
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
#: field of typed contents of a datatype in gRPC; FP16 has none
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
#: what is told in gRPC by one code, by the statuses of HTTP
CODES = {
    "INVALID_ARGUMENT": {400, 415},
    "DEADLINE_EXCEEDED": {408},
    "NOT_FOUND": {404},
    "ALREADY_EXISTS": {409},
    "FAILED_PRECONDITION": {409},
    "PERMISSION_DENIED": {403},
    "UNAUTHENTICATED": {401},
    "RESOURCE_EXHAUSTED": {413, 429},
    "UNIMPLEMENTED": {404, 405, 501},
    "UNAVAILABLE": {503},
    "INTERNAL": {500},
    "UNKNOWN": {500},
}


class Refused(Exception):
    """A server refused a request.

    Attributes:
        statuses: of HTTP that the answer tells: one, or those that a code of gRPC stands for.   message: what it says.
    """

    def __init__(self, statuses: set[int], message: str) -> None:
        super().__init__(f"{sorted(statuses)}: {message}")
        self.statuses, self.message = statuses, message


@dataclass
class Answer:
    """Attributes: as of a response: tensors by name in their order, version, id, parameters of the response."""

    outputs: dict[str, np.ndarray]
    version: str = ""
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tensor:
    """An input that may be odd.

    Attributes:
        data: its values.   datatype, shape: that the request tells, those of the data if None.
        parameters: of the input.   nested: in JSON as nested lists.
    """

    data: Any
    datatype: str | None = None
    shape: Sequence[int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    nested: bool = False

    def __post_init__(self) -> None:
        self.data = np.asarray(self.data)
        self.is_odd = self.datatype is not None or self.shape is not None
        self.datatype = NAMES[self.data.dtype] if self.datatype is None else self.datatype
        self.shape = list(self.data.shape if self.shape is None else self.shape)


class Endpoint(ABC):
    """A server, and how it is asked.

    Args:
        url: ``host:port``.
        lacks: features of the suite that the server cannot do -> why not; see ``inference_suite.FEATURES``.
        refuses: those of them that it has to refuse, rather than not to be asked for.
        max_bytes: most bytes of a request that the server takes; None: it has no such limit.
    """

    kind = ""
    own_lacks: ClassVar[Mapping[str, str]] = {}  # what the client cannot do

    def __init__(
        self,
        url: str,
        *,
        lacks: Mapping[str, str] | None = None,
        refuses: Collection[str] = (),
        max_bytes: int | None = None,
    ) -> None:
        self.url = url
        self.lacks = {**self.own_lacks, **(lacks or {})}
        self.refuses = set(refuses) - set(self.own_lacks)
        self.max_bytes = max_bytes

    def ask(
        self,
        inputs: Mapping[str, Any],
        *,
        model: str = "rows",
        version: str = "",
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
    ) -> Answer:
        """Ask for an inference.

        Args:
            inputs: arrays or ``Tensor``.   outputs: that are wanted; empty: all.

        Raises:
            Refused: the server does not answer it.
        """
        tensors = {name: one if isinstance(one, Tensor) else Tensor(one) for name, one in inputs.items()}
        return self._infer(tensors, model, version, id, dict(parameters or {}), list(outputs))

    @abstractmethod
    def _infer(
        self, inputs: dict[str, Tensor], model: str, version: str, id: str, parameters: dict[str, Any], outputs: list[str]
    ) -> Answer: ...

    @abstractmethod
    def get(self, what: str, model: str = "", version: str = "") -> Any:
        """``live``, ``ready``, ``model_ready`` (bools); ``metadata``, ``model_metadata``, ``config``, ``statistics``, ``index``
        (as JSON has them)."""

    def close(self) -> None:
        """Close its connections."""


# -- plain HTTP ------------------------------------------------------------------


class PlainHttp(Endpoint):
    """The standard library's HTTP client: all that the protocol can say, by JSON or with binary tensors."""

    def __init__(self, url: str, *, binary: bool = False, token: str = "", prefix: str = "", **more: Any) -> None:
        super().__init__(url, **more)
        self.binary, self.kind, self.prefix = binary, "http binary" if binary else "http json", prefix
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._connection: http.client.HTTPConnection | None = None
        if binary:
            self.lacks.setdefault("json data", "sends tensors as bytes")

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of an answer."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self.url, timeout=HANG_SECONDS)
        try:
            self._connection.request(method, self.prefix + path, body or None, {**self.headers, **headers})
            answer = self._connection.getresponse()
            return answer.status, answer.headers, answer.read()
        except BaseException:
            self.close()
            raise

    def _infer(
        self, inputs: dict[str, Tensor], model: str, version: str, id: str, parameters: dict[str, Any], outputs: list[str]
    ) -> Answer:
        head: dict[str, Any] = {"inputs": []}
        parts: list[bytes] = []
        for name, one in inputs.items():
            tensor: dict[str, Any] = {"name": name, "datatype": one.datatype, "shape": one.shape}
            own = dict(one.parameters)
            if self.binary:
                parts.append(one.data.tobytes())
                own["binary_data_size"] = len(parts[-1])
            else:
                tensor["data"] = (one.data if one.nested else one.data.reshape(-1)).tolist()
            head["inputs"].append(tensor | ({"parameters": own} if own else {}))
        if self.binary:
            parameters["binary_data_output"] = True
        head |= {"id": id} if id else {}
        head |= {"parameters": parameters} if parameters else {}
        head |= {"outputs": [{"name": name} for name in outputs]} if outputs else {}
        text = json.dumps(head).encode()
        headers = {"Content-Type": "application/json"}
        if self.binary:
            headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
        path = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "") + "/infer"
        status, told, body = self.request("POST", path, b"".join([text, *parts]), **headers)
        if status != 200:
            raise Refused({status}, error_of(body))
        return read_answer(body, told.get("Inference-Header-Content-Length"))

    def get(self, what: str, model: str = "", version: str = "") -> Any:
        of_model = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
        method, path = {
            "live": ("GET", "/v2/health/live"),
            "ready": ("GET", "/v2/health/ready"),
            "model_ready": ("GET", f"{of_model}/ready"),
            "metadata": ("GET", "/v2"),
            "model_metadata": ("GET", of_model),
            "config": ("GET", f"{of_model}/config"),
            "statistics": ("GET", f"{of_model}/stats"),
            "index": ("POST", "/v2/repository/index"),
        }[what]
        status, _, body = self.request(method, path)
        if what in ("live", "ready", "model_ready"):
            return status == 200
        if status != 200:
            raise Refused({status}, error_of(body))
        return json.loads(body)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def error_of(body: bytes) -> str:
    """The message of an error's body, which has to be JSON with ``error``."""
    told = json.loads(body)
    assert isinstance(told["error"], str) and told["error"], told
    return str(told["error"])


def read_answer(body: bytes, head_bytes: str | None) -> Answer:
    """An answer from its body."""
    head_end = len(body) if head_bytes is None else int(head_bytes)
    head, at, outputs = json.loads(body[:head_end]), head_end, {}
    for tensor in head["outputs"]:
        dtype, own = DTYPES[tensor["datatype"]], dict(tensor.get("parameters", {}))
        size = own.pop("binary_data_size", None)
        if size is None:
            data = np.array(tensor["data"], dtype)
        else:
            data, at = np.frombuffer(body[at : at + size], dtype), at + size
        outputs[tensor["name"]] = data.reshape(tensor["shape"])
    assert at == len(body), f"{len(body) - at} bytes more than the answer tells"
    return Answer(outputs, head.get("model_version", ""), head.get("id", ""), head.get("parameters", {}))


# -- tritonclient ----------------------------------------------------------------


class _Triton(Endpoint):
    own_lacks: ClassVar[Mapping[str, str]] = {
        "odd tensors": "tritonclient itself refuses data that do not fit their shape",
        "input parameters": "tritonclient has no parameters of inputs",
    }
    package = ""

    def __init__(self, url: str, *, token: str = "", **more: Any) -> None:
        super().__init__(url, **more)
        self.api = pytest.importorskip(self.package)
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        self.client = self._connect()

    def _connect(self) -> Any:
        return self.api.InferenceServerClient(self.url)

    def _input(self, made: Any, data: np.ndarray) -> None:
        made.set_data_from_numpy(data)

    def _outputs(self, names: list[str]) -> Any:
        return [self.api.InferRequestedOutput(name) for name in names] or None

    @abstractmethod
    def _read(self, result: Any) -> Answer: ...

    def _infer(
        self, inputs: dict[str, Tensor], model: str, version: str, id: str, parameters: dict[str, Any], outputs: list[str]
    ) -> Answer:
        made = [self.api.InferInput(name, one.shape, one.datatype) for name, one in inputs.items()]
        for one, tensor in zip(made, inputs.values()):
            self._input(one, tensor.data)
        return self._read(
            self._call(
                "infer",
                model,
                made,
                model_version=version,
                request_id=id,
                outputs=self._outputs(outputs),
                parameters=parameters or None,
            )
        )

    def _call(self, method: str, *args: Any, **more: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return getattr(self.client, method)(*args, headers=self.headers or None, **more)
        except InferenceServerException as problem:
            status = str(problem.status()).removeprefix("StatusCode.")
            statuses = CODES[status] if status in CODES else {int(status)}
            raise Refused(statuses, problem.message()) from problem

    def get(self, what: str, model: str = "", version: str = "") -> Any:
        as_json = {"as_json": True} if "grpc" in self.package else {}
        name, *args = {
            "live": ["is_server_live"],
            "ready": ["is_server_ready"],
            "model_ready": ["is_model_ready", model, version],
            "metadata": ["get_server_metadata"],
            "model_metadata": ["get_model_metadata", model, version],
            "config": ["get_model_config", model, version],
            "statistics": ["get_inference_statistics", model, version],
            "index": ["get_model_repository_index"],
        }[what]
        told = self._call(name, *args, **({} if what in ("live", "ready", "model_ready") else as_json))
        if what == "index" and as_json:
            return told.get("models", [])
        return told.get("config", told) if what == "config" else told

    def close(self) -> None:
        self.client.close()


class TritonHttp(_Triton):
    """``tritonclient.http``, with binary tensors or JSON.

    Connections have no time-outs of its own choice: an answer on a busy machine may take long.
    """

    package = "tritonclient.http"

    def __init__(self, url: str, *, binary: bool = True, **more: Any) -> None:
        self.binary, self.kind = binary, f"tritonclient http {'binary' if binary else 'json'}"
        super().__init__(url, **more)
        self.lacks.setdefault("slashes", "tritonclient does not quote names")
        if binary:
            self.lacks.setdefault("json data", "sends tensors as bytes")
        else:
            self.lacks.setdefault("all outputs", "tritonclient asks for binary outputs if it names none")
            self.lacks.setdefault("nested data", "tritonclient sends flat data")

    def _connect(self) -> Any:
        return self.api.InferenceServerClient(self.url, connection_timeout=HANG_SECONDS, network_timeout=HANG_SECONDS)

    def _input(self, made: Any, data: np.ndarray) -> None:
        made.set_data_from_numpy(data, binary_data=self.binary)

    def _outputs(self, names: list[str]) -> Any:
        return [self.api.InferRequestedOutput(name, binary_data=self.binary) for name in names] or None

    def _read(self, result: Any) -> Answer:
        told = result.get_response()
        outputs = {one["name"]: result.as_numpy(one["name"]) for one in told["outputs"]}
        return Answer(outputs, told.get("model_version", ""), told.get("id", ""), told.get("parameters", {}))


class TritonGrpc(_Triton):
    """``tritonclient.grpc``."""

    package, kind = "tritonclient.grpc", "tritonclient grpc"
    own_lacks: ClassVar[Mapping[str, str]] = {**_Triton.own_lacks, "json data": "sends tensors as bytes"}

    def _read(self, result: Any) -> Answer:
        return read_message(result.get_response())


class PlainGrpc(TritonGrpc):
    """The messages themselves, with typed contents in the place of bytes, by the stubs of tritonclient."""

    kind = "grpc typed"
    own_lacks: ClassVar[Mapping[str, str]] = {
        "json data": "sends typed contents",
        "fp16 inputs": "the protocol has no typed contents of FP16",
    }

    def _connect(self) -> Any:
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        self.channel = grpc.insecure_channel(self.url, [("grpc.max_receive_message_length", -1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        return self.api.InferenceServerClient(self.url)

    def _infer(
        self, inputs: dict[str, Tensor], model: str, version: str, id: str, parameters: dict[str, Any], outputs: list[str]
    ) -> Answer:
        from tritonclient.grpc import service_pb2

        request = service_pb2.ModelInferRequest(model_name=model, model_version=version, id=id)
        set_parameters(request.parameters, parameters)
        for name, one in inputs.items():
            tensor = request.inputs.add(name=name, datatype=one.datatype, shape=one.shape)
            set_parameters(tensor.parameters, one.parameters)
            values = one.data.reshape(-1).tolist()
            getattr(tensor.contents, CONTENTS.get(NAMES[one.data.dtype], "fp32_contents")).extend(values)
        for name in outputs:
            request.outputs.add(name=name)
        return read_message(self.send(request))

    def send(self, request: Any, method: str = "ModelInfer") -> Any:
        """The message that answers another one.

        Raises:
            Refused: the server does not answer it.
        """
        import grpc

        try:
            metadata = tuple(self.headers.items())
            return getattr(self.stub, method)(request, timeout=HANG_SECONDS, metadata=metadata)
        except grpc.RpcError as problem:
            raise Refused(CODES[problem.code().name], problem.details()) from problem

    def close(self) -> None:
        super().close()
        self.channel.close()


def set_parameters(place: Any, parameters: Mapping[str, Any]) -> None:
    """Set parameters of a message."""
    kinds = ((bool, "bool_param"), (int, "int64_param"), (str, "string_param"), (float, "double_param"))
    for name, value in parameters.items():
        setattr(place[name], next(field for kind, field in kinds if isinstance(value, kind)), value)


def read_message(told: Any) -> Answer:
    """An answer from its message; outputs by raw contents or typed ones."""
    outputs = {}
    for i, tensor in enumerate(told.outputs):
        if told.raw_output_contents:
            data = np.frombuffer(told.raw_output_contents[i], DTYPES[tensor.datatype])
        else:
            data = np.array(getattr(tensor.contents, CONTENTS[tensor.datatype]), DTYPES[tensor.datatype])
        outputs[tensor.name] = data.reshape(tuple(tensor.shape))
    parameters = {name: getattr(one, one.WhichOneof("parameter_choice")) for name, one in told.parameters.items()}
    return Answer(outputs, told.model_version, told.id, parameters)


# -- the client of this package ------------------------------------------------------


class OwnClient(Endpoint):
    """``hps_numba.client``, without retries."""

    kind = "hps_numba.client"
    own_lacks: ClassVar[Mapping[str, str]] = {
        "odd tensors": "the client sends arrays as they are",
        "json data": "sends tensors as bytes",
        "config": "the client does not ask for it",
        "statistics": "the client does not ask for it",
    }

    def __init__(self, url: str, *, token: str | None = None, **more: Any) -> None:
        from hps_numba.client import Client

        super().__init__(url, **more)
        self.client = Client(f"http://{url}", token=token, retries=0, timeout=HANG_SECONDS)

    def _infer(
        self, inputs: dict[str, Tensor], model: str, version: str, id: str, parameters: dict[str, Any], outputs: list[str]
    ) -> Answer:
        arrays = {name: one.data for name, one in inputs.items()}
        own = {name: one.parameters for name, one in inputs.items() if one.parameters}
        told = self._call(
            "infer", model, arrays, parameters=parameters, input_parameters=own, outputs=outputs, version=version, id=id
        )
        return Answer(dict(told.outputs), told.version, told.id, dict(told.parameters))

    def _call(self, method: str, *args: Any, **more: Any) -> Any:
        from hps_numba.errors import HpsError

        try:
            return getattr(self.client, method)(*args, **more)
        except HpsError as problem:
            message, _, status = str(problem).rpartition("(HTTP ")
            raise Refused({int(status.rstrip(")"))}, message) from problem

    def get(self, what: str, model: str = "", version: str = "") -> Any:
        name, *args = {
            "live": ["ready"],
            "ready": ["ready"],
            "model_ready": ["ready", model],
            "metadata": ["metadata"],
            "model_metadata": ["metadata", model],
            "index": ["models"],
        }[what]
        return self._call(name, *args)

    def close(self) -> None:
        self.client.close()
