"""One suite of requests for every server of the Open Inference Protocol that answers with the tables of a config.

A test module of a server starts it on the config of ``write_suite`` once, gives an ``Endpoint`` of it as a fixture, and an
``HPS`` on the same config, which says what is right::

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_suite(case: Case, endpoint: Endpoint, reference: HPS) -> None:
        case.run(endpoint, reference)

What a server or a client cannot do by its own limits is named in ``Endpoint.lacks``, by the names of ``FEATURES``, with the
reason that the skipped test shows. What the server has to refuse, as it cannot do it, is named in ``Endpoint.refuses`` too:
then such a request must be refused, and the next right one answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.inference_endpoints import Answer, Endpoint, Refused, Tensor
from support.oracles import EXTREME_64

from hps_numba import HPS

__all__ = ["CASES", "FEATURES", "TABLES", "Case", "write_suite"]

#: what ``Endpoint.lacks`` may name
FEATURES = {
    "all outputs": "a request that names no outputs gets all of them",
    "config": "the config of a model",
    "empty": "tensors without elements",
    "errors": "the status and the words of errors of the tables' protocol; without it a refusal alone is asked for",
    "flat 1": "KEYS and NUMKEYS of one dimension",
    "flat 2": "KEYS and NUMKEYS of two dimensions",
    "fp16": "answers in half precision",
    "ids": "the answer has the id of the request",
    "index": "the index of the repository",
    "input parameters": "parameters of an input",
    "json data": "tensors as JSON",
    "key types": "keys of any integer datatype",
    "max bytes": "a request that is too large is refused as such",
    "nested data": "tensors as nested lists of JSON",
    "odd tensors": "tensors whose data, shape and datatype do not fit",
    "parameters": "parameters of a request",
    "response parameters": "NumSample and DeviceID with an answer of the flat protocol",
    "shapes": "keys of any rank",
    "slashes": "names with a slash arrive as such",
    "statistics": "statistics of a model",
    "versions": "the version of a model is the one that HPS has",
}
#: tables of model ``rows``: name -> (keys, dim)
TABLES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "user": ((*range(200), *(key for key in EXTREME_64 if not 0 <= key < 200)), 4),
    "item": (tuple(range(1000, 3000)), 8),
    "wide": (tuple(range(0, 900, 3)), 97),
    "one": (tuple(range(-50, 50)), 1),
}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SHAPES: Sequence[tuple[int, ...]] = ((6,), (2, 3), (1, 2, 3), (3, 1), (1,), (), (0,), (0, 3), (2, 0))
MODES = ("sum", "mean", "sqrtn", "max")


def write_suite(folder: Path, **top: Any) -> Path:
    """Write sparse models and a config: model ``rows`` with ``TABLES``, and ``other`` with one table without a name.

    Args:
        top: keys of the config beside ``models``.
    """
    workshop = Workshop(folder)
    named = [(keys, dim) for keys, dim in TABLES.values()]
    rows = workshop.model(*named, name="rows", embedding_table_names=list(TABLES), max_batch_size=65_536)
    other = workshop.model((range(500), 16), name="other", stamp=1, max_batch_size=1024)
    path = folder / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": [rows, other], **top}))
    return path


@dataclass(frozen=True)
class Case:
    """A request and its answer.

    Attributes:
        name: of the test.   check: asks the endpoint and compares with the server on the same files.
        needs: features without which it cannot be asked for.
    """

    name: str
    check: Callable[[Endpoint, HPS], None]
    needs: tuple[str, ...] = field(default=())

    def run(self, endpoint: Endpoint, reference: HPS) -> None:
        """Run it; skipped with the reason of what the endpoint lacks and does not refuse."""
        unknown = set(endpoint.lacks) - set(FEATURES) - {"fp16 inputs"}
        assert not unknown and set(self.needs) <= set(FEATURES), f"no features: {unknown}, {self.needs}"
        lacking = [feature for feature in self.needs if feature in endpoint.lacks]
        for feature in lacking:
            if feature not in endpoint.refuses:
                pytest.skip(f"{endpoint.kind}: {endpoint.lacks[feature]}")
        if not lacking:
            self.check(endpoint, reference)
            return
        with pytest.raises(Refused) as problem:
            self.check(endpoint, reference)
        assert 400 in problem.value.statuses and problem.value.message, problem.value
        same(plain(endpoint).outputs["user"], reference.lookup(np.arange(3), "rows", "user"))

    def __str__(self) -> str:
        return self.name


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """The same dtype, shape and bits."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (
        f"{got.dtype}{got.shape} {expected.dtype}{expected.shape}"
    )
    assert got.tobytes() == np.ascontiguousarray(expected).tobytes()


def some_keys(table: str, count: int, seed: int = 0) -> np.ndarray:
    """Keys of a table, with repeats."""
    return np.random.default_rng((seed, count, len(table))).choice(np.array(TABLES[table][0], np.int64), count)


# -- flat --------------------------------------------------------------------------


def flat(counts: Sequence[int], dims: int, *, seed: int = 0, keys: Any = None, **more: Any) -> Callable[[Endpoint, HPS], None]:
    """Ask by KEYS and NUMKEYS."""

    def check(endpoint: Endpoint, reference: HPS) -> None:
        each = [some_keys(table, n, seed) for table, n in zip(TABLES, counts)] if keys is None else keys
        together = np.concatenate([np.asarray(one, np.int64) for one in each])
        numbers = np.array(counts, np.int32)
        if dims == 2:
            together, numbers = together[None], numbers[None]
        if "all outputs" in endpoint.lacks:
            more["outputs"] = ["OUTPUT0"]
        answer = endpoint.ask({"KEYS": together, "NUMKEYS": numbers}, **more)
        expected = np.concatenate(
            [reference.lookup(np.asarray(one, np.int64), "rows", table).ravel() for table, one in zip(TABLES, each)]
        )
        assert list(answer.outputs) == ["OUTPUT0"]
        same(answer.outputs["OUTPUT0"], expected if dims == 1 else expected[None])
        if "response parameters" not in endpoint.lacks:
            assert answer.parameters["NumSample"] == together.size and answer.parameters["DeviceID"] == -1

    return check


def flat_cases() -> Iterator[Case]:
    splits = {
        "even": (3, 3, 3, 3),
        "first": (5, 0, 0, 0),
        "last": (0, 0, 0, 5),
        "middle": (0, 2, 1, 0),
        "uneven": (1, 20, 300, 4),
        "single": (0, 1, 0, 0),
        "large": (5000, 3000, 2000, 1000),
    }
    for dims in (1, 2):
        needs = (f"flat {dims}",)
        for name, counts in splits.items():
            yield Case(f"flat-{dims}-{name}", flat(counts, dims), needs)
        unknown = [[10**15, -3, 7], [-1], [1, 2, 2], [77]]
        yield Case(f"flat-{dims}-unknown-keys", flat((3, 1, 3, 1), dims, keys=unknown), needs)
        repeated = [[5] * 50, [1000] * 30, [3] * 20, [-50] * 10]
        yield Case(f"flat-{dims}-repeated-keys", flat((50, 30, 20, 10), dims, keys=repeated), needs)
        extreme = [EXTREME_64, [], [], EXTREME_64]
        yield Case(f"flat-{dims}-extreme-keys", flat((9, 0, 0, 9), dims, keys=extreme), needs)
        yield Case(f"flat-{dims}-nothing", flat((0, 0, 0, 0), dims), (*needs, "empty"))
        yield Case(f"flat-{dims}-chosen-output", flat((1, 1, 1, 1), dims, outputs=["OUTPUT0"]), needs)
    yield Case("flat-other-model", check_other_model, ("flat 1",))


def check_other_model(endpoint: Endpoint, reference: HPS) -> None:
    keys = np.array([3, 499, 500, 0], np.int64)
    inputs = {"KEYS": keys, "NUMKEYS": np.array([4], np.int32)}
    answer = endpoint.ask(inputs, model="other", outputs=["OUTPUT0"])
    same(answer.outputs["OUTPUT0"], reference.lookup(keys, "other", 0).ravel())


# -- named -------------------------------------------------------------------------


def named(
    tables: Mapping[str, Any], *, outputs: Sequence[str] = (), half: bool = False, **more: Any
) -> Callable[[Endpoint, HPS], None]:
    """Ask for rows of tables by their names."""

    def check(endpoint: Endpoint, reference: HPS) -> None:
        parameters = {"output_dtype": "FP16"} if half else {}
        wanted = list(outputs) or list(tables)
        chosen = wanted if outputs or "all outputs" in endpoint.lacks else ()
        answer = endpoint.ask(tables, outputs=chosen, parameters=parameters, **more)
        assert list(answer.outputs) == wanted
        for name in wanted:
            one = tables[name]
            expected = reference.lookup(one.data if isinstance(one, Tensor) else one, "rows", name)
            same(answer.outputs[name], expected.astype(np.float16) if half else expected)

    return check


def named_cases() -> Iterator[Case]:
    for dtype in INTEGERS:
        for shape in SHAPES:
            keys = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
            needs = ["shapes"] if len(shape) != 1 else []
            needs += ["key types"] if dtype != "int64" else []
            needs += ["empty"] if not keys.size else []
            yield Case(f"named-{dtype}-{'x'.join(map(str, shape)) or 'scalar'}", named({"user": keys}), tuple(needs))
    for table in TABLES:
        yield Case(f"named-{table}-known", named({table: some_keys(table, 50)}))
        yield Case(f"named-{table}-unknown", named({table: np.array([10**9, -(10**9), 10**9])}))
        mixed = np.concatenate([some_keys(table, 7), [10**12, -(10**12)]])
        yield Case(f"named-{table}-mixed", named({table: mixed}))
    yield Case("named-extreme-keys", named({"user": np.array(EXTREME_64)}))
    yield Case("named-extreme-unknown-keys", named({"item": np.array(EXTREME_64)}))
    yield Case("named-unsigned-beyond-32-bits", named({"user": np.array([2**32, 2**63, 2**64 - 1], np.uint64)}), ("key types",))
    for count in (2, 31, 32, 33, 1000, 8192, 16_384, 16_385, 60_000):
        yield Case(f"named-{count}-keys", named({"item": some_keys("item", count)}))
    yield Case("named-large-answer", named({"wide": some_keys("wide", 5000)}))
    every = {table: some_keys(table, 10 + i) for i, table in enumerate(TABLES)}
    yield Case("named-every-table", named(every))
    yield Case("named-in-another-order", named(dict(reversed(every.items()))))
    yield Case("named-shapes-of-their-own", named({"user": np.ones((2, 2), int), "one": np.ones(3, int)}), ("shapes",))
    yield Case("named-one-of-two-outputs", named({"user": np.arange(3), "item": np.arange(3)}, outputs=["item"]))
    yield Case("named-every-output-of-the-metadata", check_every_output)
    yield Case("named-outputs-in-their-order", named(every, outputs=["one", "wide", "user"]))
    for nested_shape in ((2, 3), (1, 1, 1), (0, 2)):
        keys = np.arange(np.prod(nested_shape)).reshape(nested_shape)
        needs = ("nested data", "json data", "shapes", *(["empty"] if not keys.size else []))
        yield Case(f"named-nested-{'x'.join(map(str, nested_shape))}", named({"user": Tensor(keys, nested=True)}), needs)


def check_every_output(endpoint: Endpoint, reference: HPS) -> None:
    """Perf Analyzer names all outputs, whichever it gives inputs for."""
    answer = endpoint.ask({"item": some_keys("item", 5)}, outputs=["OUTPUT0", *TABLES])
    assert list(answer.outputs) == ["item"]
    same(answer.outputs["item"], reference.lookup(some_keys("item", 5), "rows", "item"))


def half_cases() -> Iterator[Case]:
    for table in TABLES:
        yield Case(f"fp16-{table}", named({table: some_keys(table, 20)}, half=True), ("fp16", "parameters"))
    several = {"user": some_keys("user", 5), "one": some_keys("one", 6)}
    yield Case("fp16-several", named(several, half=True), ("fp16", "parameters"))
    yield Case("fp16-chosen", named(several, half=True, outputs=["one"]), ("fp16", "parameters"))
    yield Case("fp16-nothing", named({"user": np.empty(0, np.int64)}, half=True), ("fp16", "parameters", "empty"))

    def check_fp32(endpoint: Endpoint, reference: HPS) -> None:
        answer = endpoint.ask({"user": np.arange(4)}, parameters={"output_dtype": "FP32"}, outputs=["user"])
        same(answer.outputs["user"], reference.lookup(np.arange(4), "rows", "user"))

    yield Case("fp32-by-parameter", check_fp32, ("parameters",))


# -- bags --------------------------------------------------------------------------

BAGS = {
    "regular": (0, 3, 6, 9),
    "ragged": (0, 1, 1, 7, 9),
    "empty-bags": (0, 0, 0, 9, 9),
    "one-bag": (0, 9),
}


def pooled(
    offsets: Any,
    mode: str = "",
    *,
    table: str = "item",
    weighted: bool = False,
    own: bool = False,
    half: bool = False,
    keys: Any = None,
) -> Callable[[Endpoint, HPS], None]:
    """Ask for a pooled row of each bag; ``own``: the mode is a parameter of the input."""

    def check(endpoint: Endpoint, reference: HPS) -> None:
        ends = np.asarray(offsets)
        wanted = some_keys(table, int(ends[-1])) if keys is None else np.asarray(keys)
        weights = (np.arange(len(wanted)) % 7 / 4 + 0.25).astype(np.float32) if weighted else None
        modes = {"mode": mode} if mode else {}
        inputs: dict[str, Any] = {table: Tensor(wanted, parameters=modes) if own else wanted, f"{table}.offsets": ends}
        inputs |= {f"{table}.weights": weights} if weights is not None else {}
        parameters = ({} if own else modes) | ({"output_dtype": "FP16"} if half else {})
        answer = endpoint.ask(inputs, parameters=parameters, outputs=[table])
        expected = reference.lookup_pooled(wanted, ends, "rows", table, weights=weights, combiner=mode or "sum")
        same(answer.outputs[table], expected.astype(np.float16) if half else expected)

    return check


def pooled_cases() -> Iterator[Case]:
    for mode in MODES:
        for weighted in (False, True):
            for name, ends in BAGS.items():
                ending = "-weighted" if weighted else ""
                yield Case(f"pooled-{mode}-{name}{ending}", pooled(ends, mode, weighted=weighted), ("parameters",))
        yield Case(f"pooled-{mode}-by-input", pooled(BAGS["ragged"], mode, own=True), ("input parameters",))
    for table in TABLES:
        yield Case(f"pooled-{table}", pooled((0, 2, 5, 5, 11), table=table))
    for dtype in ("int32", "uint32"):
        yield Case(f"pooled-offsets-{dtype}", pooled(np.array(BAGS["ragged"], dtype)), ("key types",))
    yield Case("pooled-default-mode", pooled(BAGS["ragged"]))
    yield Case("pooled-half", pooled(BAGS["ragged"], "mean", half=True), ("parameters", "fp16"))
    yield Case("pooled-unknown-keys", pooled((0, 2, 3), keys=np.array([10**9, 1000, -5])))
    yield Case("pooled-extreme-keys", pooled((0, 4, 9), table="user", keys=np.array(EXTREME_64)))
    yield Case("pooled-no-keys", pooled((0, 0, 0), keys=np.empty(0, np.int64)), ("empty",))
    yield Case("pooled-no-bags", pooled((0,), keys=np.empty(0, np.int64)), ("empty",))
    yield Case("pooled-many-bags", pooled(np.arange(0, 20_001, 4)))
    yield Case("pooled-beside-rows", check_pooled_beside_rows)


def check_pooled_beside_rows(endpoint: Endpoint, reference: HPS) -> None:
    users, items, ends = some_keys("user", 4), some_keys("item", 6), np.array([0, 2, 6])
    answer = endpoint.ask({"item": items, "item.offsets": ends, "user": users}, outputs=["user", "item"])
    same(answer.outputs["user"], reference.lookup(users, "rows", "user"))
    same(answer.outputs["item"], reference.lookup_pooled(items, ends, "rows", "item", combiner="sum"))


# -- ids and versions ----------------------------------------------------------------


def plain(endpoint: Endpoint, **more: Any) -> Answer:
    """A small right request."""
    return endpoint.ask({"user": np.arange(3)}, outputs=["user"], **more)


def id_cases() -> Iterator[Case]:
    def with_id(text: str) -> Callable[[Endpoint, HPS], None]:
        def check(endpoint: Endpoint, reference: HPS) -> None:
            assert plain(endpoint, id=text).id == text

        return check

    for name, text in {"none": "", "number": "42", "words": 'a "b" \\ c', "letters": "grün 日本", "long": "x" * 1000}.items():
        yield Case(f"id-{name}", with_id(text), ("ids",))

    def check_version(endpoint: Endpoint, reference: HPS) -> None:
        in_force = str(reference.model_version("rows"))
        assert plain(endpoint).version == in_force == plain(endpoint, version=in_force).version

    yield Case("version-in-force", check_version, ("versions",))


# -- errors --------------------------------------------------------------------------


def refused(
    inputs: Mapping[str, Any], status: int, words: str, *, always: bool = False, **more: Any
) -> Callable[[Endpoint, HPS], None]:
    """Ask for what is refused, and afterwards for what is right; ``always``: the status is that of any server."""

    def check(endpoint: Endpoint, reference: HPS) -> None:
        with pytest.raises(Refused) as problem:
            endpoint.ask(inputs, **more)
        assert "Traceback" not in problem.value.message and 'File "' not in problem.value.message
        if always or "errors" not in endpoint.lacks:
            assert status in problem.value.statuses, problem.value
        if "errors" not in endpoint.lacks:
            assert words in problem.value.message, problem.value
        same(plain(endpoint).outputs["user"], reference.lookup(np.arange(3), "rows", "user"))

    return check


def flat_inputs(keys: Any, counts: Any, dtype: Any = np.int32, **more: Any) -> dict[str, Any]:
    return {"KEYS": np.asarray(keys), "NUMKEYS": np.asarray(counts, dtype), **more}


def error_cases() -> Iterator[Case]:
    one, ends = np.array([1]), np.array([0, 1])
    right = flat_inputs([1, 2], [2, 0, 0, 0])
    wrong: dict[str, tuple[Mapping[str, Any], str]] = {
        "keys-alone": ({"KEYS": one}, "KEYS"),
        "counts-alone": ({"NUMKEYS": np.array([1, 0, 0, 0], np.int32)}, "NUMKEYS"),
        "three-counts": (flat_inputs([1], [1, 0, 0]), "expected 4 counts"),
        "five-counts": (flat_inputs([1], [1, 0, 0, 0, 0]), "expected 4 counts"),
        "too-few-keys": (flat_inputs([1], [1, 1, 0, 0]), "sum is 1"),
        "too-many-keys": (flat_inputs([1, 2, 3], [1, 1, 0, 0]), "sum is 3"),
        "negative-count": (flat_inputs([1], [2, -1, 0, 0]), "sum is 1"),
        "counts-that-overflow": (flat_inputs([1], [2**31 - 1, 2**31 - 1, 2, 1]), "sum is 1"),
        "flat-and-named": (right | {"user": one}, "alone, got user"),
        "unknown-input": ({"nobody": one}, "nobody"),
        "path-as-input": ({"../../etc/passwd": one}, "passwd"),
        "offsets-without-keys": ({"user.offsets": ends}, "user.offsets"),
        "weights-without-offsets": ({"user": one, "user.weights": np.ones(1, np.float32)}, "user.offsets"),
        "offsets-beyond-keys": ({"user": one, "user.offsets": np.array([0, 9])}, "offsets"),
        "offsets-that-fall": ({"user": np.arange(3), "user.offsets": np.array([0, 2, 1, 3])}, "offsets"),
        "offsets-from-one": ({"user": one, "user.offsets": np.array([1, 1])}, "offsets"),
        "negative-offsets": ({"user": one, "user.offsets": np.array([-1, 1])}, "offsets"),
        "too-few-weights": (
            {"user": np.arange(2), "user.offsets": np.array([0, 2]), "user.weights": np.ones(1, np.float32)},
            "weights",
        ),
    }
    for name, (inputs, words) in wrong.items():
        yield Case(f"refused-{name}", refused(inputs, 400, words))
    kinds: dict[str, tuple[Mapping[str, Any], str]] = {
        "float-keys": ({"user": np.array([1.5])}, "user: expected integers"),
        "bool-keys": ({"user": np.array([True])}, "user: expected integers"),
        "float-flat-keys": (flat_inputs([1.0], [1, 0, 0, 0]), "KEYS: expected integers"),
        "float-counts": (flat_inputs([1], [1, 0, 0, 0], np.float64), "NUMKEYS: expected integers"),
        "float-offsets": ({"user": one, "user.offsets": np.array([0.0, 1.0])}, "user.offsets: expected integers"),
        "flat-keys-of-rank-3": (flat_inputs([[[1]]], [1, 0, 0, 0]), "[n] or [1, n]"),
        "flat-keys-of-two-rows": (flat_inputs([[1], [2]], [2, 0, 0, 0]), "[n] or [1, n]"),
    }
    for name, (inputs, words) in kinds.items():
        yield Case(f"refused-{name}", refused(inputs, 400, words))
    pooled_one = {"user": one, "user.offsets": ends}
    by_parameter = ("parameters",)
    yield Case("refused-mode", refused(pooled_one, 400, "median", parameters={"mode": "median"}), by_parameter)
    yield Case("refused-number-as-mode", refused(pooled_one, 400, "'3'", parameters={"mode": 3}), by_parameter)
    yield Case("refused-output-dtype", refused({"user": one}, 400, "INT8", parameters={"output_dtype": "INT8"}), by_parameter)
    yield Case("refused-output", refused({"user": one}, 400, "item", outputs=["item"]))
    yield Case("refused-unknown-output", refused({"user": one}, 400, "nobody", outputs=["user", "nobody"]))
    yield Case("refused-no-inputs", refused({}, 400, "got none"))
    for name in ("nobody", "row", "rows2", "..", "../rows", "ROWS"):
        needs = ("slashes",) if "/" in name else ()
        yield Case(f"refused-model-{name}", refused({"user": one}, 404, "model", always=True, model=name), needs)
    for version in ("7", "99999999999999999999", "one"):
        yield Case(f"refused-version-{version}", refused({"user": one}, 404, "version", version=version))
    yield from odd_cases()


def odd_cases() -> Iterator[Case]:
    odd: dict[str, tuple[Tensor, str]] = {
        "short": (Tensor([1, 2], shape=[3]), "inputs[0]"),
        "long": (Tensor([1, 2, 3], shape=[2]), "inputs[0]"),
        "negative-shape": (Tensor([1], shape=[-1]), "shape"),
        "huge-shape": (Tensor([1], shape=[2**62, 4]), "inputs[0]"),
        "empty-but-for-its-shape": (Tensor(np.empty(0, np.int64), shape=[10**12]), "inputs[0]"),
        "unknown-datatype": (Tensor([1], datatype="INT128"), "datatype"),
        "bytes": (Tensor([1], datatype="BYTES"), "datatype"),
        "no-datatype": (Tensor([1], datatype=""), "datatype"),
    }
    for name, (tensor, words) in odd.items():
        yield Case(f"refused-odd-{name}", refused({"user": tensor}, 400, words), ("odd tensors",))


# -- limits, and what a server says of itself ------------------------------------------


def check_max_bytes(endpoint: Endpoint, reference: HPS) -> None:
    assert endpoint.max_bytes is not None, "an endpoint without a limit has to say that it lacks it"
    keys = np.full(endpoint.max_bytes // 8 + 1024, -(2**62), np.int64)
    with pytest.raises(Refused) as problem:
        endpoint.ask({"user": keys}, outputs=["user"])
    assert 413 in problem.value.statuses
    same(plain(endpoint).outputs["user"], reference.lookup(np.arange(3), "rows", "user"))


def check_health(endpoint: Endpoint, reference: HPS) -> None:
    assert endpoint.get("live") and endpoint.get("ready")
    assert endpoint.get("model_ready", "rows") and endpoint.get("model_ready", "other")


def check_unknown_is_not_ready(endpoint: Endpoint, reference: HPS) -> None:
    try:
        assert not endpoint.get("model_ready", "nobody")
    except Refused as problem:
        assert 404 in problem.statuses or 400 in problem.statuses


def check_metadata(endpoint: Endpoint, reference: HPS) -> None:
    told = endpoint.get("metadata")
    assert told["name"] and told["version"] and isinstance(told.get("extensions", []), list)


def check_model_metadata(endpoint: Endpoint, reference: HPS) -> None:
    told = endpoint.get("model_metadata", "rows")
    assert told["name"] == "rows" and told["platform"] is not None
    if "versions" not in endpoint.lacks:
        assert told["versions"] == [str(reference.model_version("rows"))]
    inputs = {one["name"]: one["datatype"] for one in told["inputs"]}
    outputs = {one["name"]: one["datatype"] for one in told["outputs"]}
    assert inputs["KEYS"] == "INT64" and inputs["NUMKEYS"] == "INT32" and outputs["OUTPUT0"] == "FP32"
    for table, (_, dim) in TABLES.items():
        assert inputs[table] == inputs[f"{table}.offsets"] == "INT64" and inputs[f"{table}.weights"] == outputs[table] == "FP32"
        shape = next(one["shape"] for one in told["outputs"] if one["name"] == table)
        assert int(shape[-1]) == dim


def check_unknown_metadata(endpoint: Endpoint, reference: HPS) -> None:
    with pytest.raises(Refused) as problem:
        endpoint.get("model_metadata", "nobody")
    assert problem.value.statuses & {404, 400} and "nobody" in problem.value.message


def check_config(endpoint: Endpoint, reference: HPS) -> None:
    told = endpoint.get("config", "rows")
    assert told["name"] == "rows"
    assert {one["name"]: one["data_type"] for one in told["input"]}["KEYS"] == "TYPE_INT64"
    assert {one["name"]: one["data_type"] for one in told["output"]}["OUTPUT0"] == "TYPE_FP32"


def check_statistics(endpoint: Endpoint, reference: HPS) -> None:
    def counts() -> tuple[int, int]:
        (told,) = endpoint.get("statistics", "rows")["model_stats"]
        parts = [told["inference_stats"][f"compute_{part}"].get("count", 0) for part in ("input", "infer", "output")]
        assert len(set(map(int, parts))) == 1, "Perf Analyzer wants the same counts"
        return int(told.get("inference_count", 0)), int(told["inference_stats"].get("success", {}).get("count", 0))

    before = counts()
    plain(endpoint)
    after = counts()
    assert after[0] > before[0] and after[1] == before[1] + 1


def check_index(endpoint: Endpoint, reference: HPS) -> None:
    told = {one["name"]: one.get("state") for one in endpoint.get("index")}
    assert told["rows"] == told["other"] == "READY"


def other_cases() -> Iterator[Case]:
    yield Case("limits-bytes", check_max_bytes, ("max bytes",))
    yield Case("health", check_health)
    yield Case("health-of-an-unknown-model", check_unknown_is_not_ready)
    yield Case("metadata", check_metadata)
    yield Case("metadata-of-a-model", check_model_metadata)
    yield Case("metadata-of-an-unknown-model", check_unknown_metadata)
    yield Case("config", check_config, ("config",))
    yield Case("statistics", check_statistics, ("statistics",))
    yield Case("index", check_index, ("index",))


CASES = [
    *flat_cases(),
    *named_cases(),
    *half_cases(),
    *pooled_cases(),
    *id_cases(),
    *error_cases(),
    *other_cases(),
]
assert len({case.name for case in CASES}) == len(CASES)
