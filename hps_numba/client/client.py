"""The client: tables looked up, models asked and looked after, over HTTP with binary tensors."""

from __future__ import annotations

import http.client
import json
import math
import random
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from hps_numba.client.connections import Connections, Response
from hps_numba.client.problems import error_of
from hps_numba.errors import ArrayError, ConfigError, HpsError, KeyDtypeError, TierError, TierUnavailable
from hps_numba.frontends.inference.tensors import DATATYPES, InferenceRequest, InferenceResponse
from hps_numba.frontends.open_inference.codec import JSON_SIZE_HEADER, decode_response, encode_request
from hps_numba.frontends.open_inference.heads import AnswerForm

__all__ = ["Client"]

_DTYPES = {np.dtype(np.float32): "FP32", np.dtype(np.float16): "FP16"}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds
_TRY_AGAIN = (429, 503)


class Client:
    """Asks a server of the Open Inference Protocol, such as ``hps-numba serve``.

    ::

        with Client("http://127.0.0.1:8000") as client:
            rows = client.lookup("m", {"user": [3, 1, 4], "item": [[1, 5], [9, 2]]})

    Args:
        url: ``http://host:port`` or ``https://host:port``.   token: bearer token.
        timeout: seconds that a call may take, tries and pauses between them together.
        retries: how often a request is tried again that cannot have changed anything, or that was not accepted: the server
            cannot be reached, cut the connection before an answer, or said 429 or 503. Pauses double from 0.05 s, with
            jitter, and last at least as long as the server asks for (Retry-After).
        tls: for https: certificates of the client, or a CA of one's own.

    Raises:
        ConfigError: the URL, the timeout or the number of retries makes no sense.

    Every method raises, beside what it names: UnknownModelError, VersionError (there is no such model or version), ArrayError
    (the request is wrong or too large), ConfigError (not allowed), CapacityError (too many requests), TierUnavailable (the
    server cannot be reached, or is not ready), TierError (it failed), ClosedError (the client was closed).

    Thread safety: every method; a request holds a connection, connections are kept for the next one.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not timeout > 0:
            raise ConfigError(f"timeout: expected more than 0 seconds, got {timeout}")
        if retries < 0:
            raise ConfigError(f"retries: expected 0 or more, got {retries}")
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError("token: expected plain characters without spaces")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._connections = Connections(url, headers, tls)
        self._timeout, self._retries = timeout, retries

    # -- tables -----------------------------------------------------------------------

    def lookup(
        self,
        model: str,
        keys: Mapping[str, ArrayLike],
        *,
        offsets: Mapping[str, ArrayLike] | None = None,
        weights: Mapping[str, ArrayLike] | None = None,
        mode: str | Mapping[str, str] = "sum",
        dtype: DTypeLike = np.float32,
        version: str | int = "",
    ) -> dict[str, np.ndarray]:
        """Rows of tables, all from one version of the model.

        Args:
            keys: integers of any shape ``S`` by the name of the table.
            offsets: by table, where its bags begin and the last one ends, ``[bags + 1]``; its rows are pooled then.
            weights: by table, of each key, float32, for tables with offsets.
            mode: sum, mean, sqrtn or max; for all tables, or by table.
            dtype: of the rows: float32 or float16.   version: that has to answer; empty: the one in force.

        Returns:
            By table, ``S + [dim]``, or ``[bags, dim]`` with offsets; they may not be written.

        Raises:
            KeyDtypeError: keys or offsets are not integers.   ArrayError: offsets or weights of a table that is not asked for.
        """
        output_type = _DTYPES.get(np.dtype(dtype))
        if output_type is None:
            raise ArrayError(f"dtype: expected float32 or float16, got {np.dtype(dtype)}")
        inputs: dict[str, ArrayLike] = {table: _integers(some, table) for table, some in keys.items()}
        for kind, given in (("offsets", offsets or {}), ("weights", weights or {})):
            for table, values in given.items():
                if table not in keys:
                    raise ArrayError(f"{kind}: expected some of tables {', '.join(keys)}, got {table!r}")
                name = f"{table}.{kind}"
                inputs[name] = _integers(values, name) if kind == "offsets" else np.ascontiguousarray(values, np.float32)
        own = {} if isinstance(mode, str) else {table: {"mode": one} for table, one in mode.items()}
        parameters: dict[str, Any] = {"mode": mode} if isinstance(mode, str) and offsets else {}
        if output_type != "FP32":
            parameters["output_dtype"] = output_type
        return dict(self.infer(model, inputs, parameters=parameters, input_parameters=own, version=version).outputs)

    def lookup_flat(self, model: str, keys: ArrayLike, num_keys: ArrayLike, *, version: str | int = "") -> np.ndarray:
        """Rows by HugeCTR's protocol.

        Args:
            keys: of table 0, then of table 1, ..., ``[n]``.   num_keys: how many of each table, ``[tables]``.

        Returns:
            All rows one after the other, float32, ``[sum of num_keys * dim]``; they may not be written.
        """
        counts = _integers(num_keys, "num_keys").astype(np.int32)
        inputs: dict[str, ArrayLike] = {"KEYS": _integers(keys, "keys").astype(np.int64, copy=False), "NUMKEYS": counts}
        return self.infer(model, inputs, version=version).outputs["OUTPUT0"]

    def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        input_parameters: Mapping[str, Mapping[str, Any]] | None = None,
        version: str | int = "",
        id: str = "",
    ) -> InferenceResponse:
        """Ask any model.

        Args:
            inputs: tensors by name.   outputs: names of those that are wanted; empty: all.
            parameters: of the request.   input_parameters: of inputs, by their names.   id: comes back with the answer.
        """
        arrays = {name: _tensor(value, name) for name, value in inputs.items()}
        request = InferenceRequest(model, arrays, str(version), id, parameters or {}, input_parameters or {}, tuple(outputs))
        body = encode_request(request, AnswerForm(binary=True))
        headers = {"Content-Type": body.content_type}
        if body.json_size is not None:
            headers[JSON_SIZE_HEADER] = str(body.json_size)
        answer = self._ask("POST", _path(model, version, "infer"), body.parts, headers)
        size = answer.headers.get(JSON_SIZE_HEADER)
        try:
            return decode_response(answer.body, None if size is None else int(size))
        except (ValueError, HpsError) as problem:
            raise TierError(f"{self._connections.url}: expected an answer of the Open Inference Protocol: {problem}") from None

    # -- the server -------------------------------------------------------------------

    def ready(self, model: str | None = None) -> bool:
        """Whether the server, or one of its models, answers requests; False also if it cannot be reached. Tried once."""
        path = "/v2/health/ready" if model is None else _path(model, "", "ready")
        try:
            return self._once("GET", path, (), {}, time.monotonic() + self._timeout).status == 200
        except TierUnavailable:
            return False

    def metadata(self, model: str | None = None, *, version: str | int = "") -> dict[str, Any]:
        """What the server says of itself, or of a model: its inputs, outputs and versions."""
        return self._json("GET", "/v2" if model is None else _path(model, version))

    def models(self) -> list[dict[str, Any]]:
        """The index: name, version, state and reason of each model."""
        return self._json("POST", "/v2/repository/index")

    def load(self, model: str) -> None:
        """Load a model of the server's config, or its files again."""
        self._json("POST", f"/v2/repository/models/{quote(model, safe='')}/load", change=True)

    def unload(self, model: str) -> None:
        """Take a model out of service."""
        self._json("POST", f"/v2/repository/models/{quote(model, safe='')}/unload", change=True)

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        self._connections.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- requests ---------------------------------------------------------------------

    def _json(self, method: str, path: str, *, change: bool = False) -> Any:
        answer = self._ask(method, path, (), {}, change=change)
        try:
            return json.loads(answer.body) if answer.body else {}
        except ValueError as problem:
            raise TierError(f"{self._connections.url}{path}: expected JSON, got: {problem}") from None

    def _ask(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes | bytearray | memoryview],
        headers: Mapping[str, str],
        *,
        change: bool = False,
    ) -> Response:
        """The answer, after as many tries as are allowed; ``change``: only what the server did not accept is tried again."""
        deadline = time.monotonic() + self._timeout
        pause, left = _FIRST_PAUSE, self._retries
        while True:
            try:
                answer = self._once(method, path, parts, headers, deadline, fresh=change)
            except TierUnavailable as problem:
                refused = isinstance(problem.__cause__, ConnectionRefusedError)
                timed_out = isinstance(problem.__cause__, TimeoutError)
                if not left or timed_out or (change and not refused):
                    raise
                asked = 0.0
            else:
                if answer.status < 400:
                    return answer
                error = error_of(answer.status, bytes(answer.body), f"{self._connections.url}{path}")
                if not left or answer.status not in _TRY_AGAIN or (change and answer.status != 429):
                    raise error
                asked = _seconds(answer.headers.get("Retry-After"))
                if time.monotonic() + asked >= deadline:
                    raise error
            wait = max(asked, pause * random.uniform(0.5, 1.0))
            time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
            pause, left = min(pause * 2, _LONGEST_PAUSE), left - 1

    def _once(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes | bytearray | memoryview],
        headers: Mapping[str, str],
        deadline: float,
        *,
        fresh: bool = False,
    ) -> Response:
        try:
            return self._connections.request(method, path, parts, headers, deadline=deadline, fresh=fresh)
        except TimeoutError as problem:
            message = f"{self._connections.url}: expected an answer within {self._timeout:g} s, there is none"
            raise TierUnavailable(message) from problem
        except (OSError, http.client.HTTPException) as problem:
            told = str(problem) or type(problem).__name__
            raise TierUnavailable(f"{self._connections.url}: cannot be reached: {told}") from problem


def _path(model: str, version: str | int = "", what: str = "") -> str:
    of_version = f"/versions/{quote(str(version), safe='')}" if version != "" else ""
    return f"/v2/models/{quote(model, safe='')}{of_version}" + (f"/{what}" if what else "")


def _integers(values: ArrayLike, place: str) -> np.ndarray:
    array = np.asarray(values)
    if not array.size and array.dtype.kind == "f":  # an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise KeyDtypeError(f"{place}: expected integers, got {array.dtype}")
    return array


def _tensor(value: ArrayLike, place: str) -> np.ndarray:
    """An array in the byte order of the protocol, of a dtype that it has."""
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in DATATYPES.values():
        raise ArrayError(f"{place}: expected a dtype of the Open Inference Protocol, got {array.dtype}")
    return array


def _seconds(text: str | None) -> float:
    """The value of Retry-After, if it is a number of seconds."""
    try:
        seconds = float(text or 0)
    except ValueError:  # a date: the client's own pauses will do
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
