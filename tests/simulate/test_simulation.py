"""The simulator: the GPU geometry equals the cache itself; sizes, warm-up, samples and their errors, advice, results."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cache_oracle import CacheOracle
from support.cache_pairs import primary_in
from support.key_streams import MINE, skewed

from hps_numba import plugins, simulate
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.errors import ConfigError, PolicyError, TraceError
from hps_numba.kernels.policies._load import load_policy
from hps_numba.simulate.candidates import find_candidate
from hps_numba.simulate.dense_trace import densify
from hps_numba.simulate.geometry import WAYS, GpuGeometry
from hps_numba.simulate.lookup_time import lookup_seconds
from hps_numba.simulate.replay import replay
from hps_numba.simulate.settings import Settings
from hps_numba.simulate.sizes import parse_sizes
from hps_numba.storage.host.store import HostStore
from hps_numba.traces.trace import open_trace


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return skewed(40_000, 4000)


POLICIES = plugins.names("hps_numba.kernels.policies")


def run(trace: Any, policies: Any, sizes: Any, **options: Any) -> simulate.Simulation:
    return simulate.run(trace, policies, sizes, progress=False, **options)


# -- equal to the cache itself ---------------------------------------------------------------------------


def one_of_each_kind() -> list[str]:
    """Built-in policies that differ in what kernels do for them; each is compiled for rows of this width."""
    kinds: dict[tuple[bool, ...], str] = {}
    for name in ["lru", "fifo", "lfu", *POLICIES]:
        policy = load_policy(name)
        more = (getattr(policy, what, None) is not None for what in ("admit", "victim"))
        kinds.setdefault((policy.needs_count, *more, getattr(policy, "takes_key", False)), name)
    return list(kinds.values())


@pytest.mark.parametrize("policy", one_of_each_kind())
@pytest.mark.parametrize(("rows", "batch"), [(20, 7), (300, 64), (300, 1), (1000, 2048)])
def test_gpu_geometry_equals_the_cache(policy: str, rows: int, batch: int, keys: np.ndarray) -> None:
    """The hits of each batch and the final content equal those of a cache that reads rows from a host store."""
    keys = keys[: 3000 if batch == 1 else 12_000]
    known = np.unique(keys)
    store = HostStore(1, allocator=PlainHostAllocator())
    store.upsert(known, np.ones((len(known), 1), np.float32))
    cache = EmbeddingCache(1, rows, device=None, policy=load_policy(policy), default=0.0, store=store)
    simulated = GpuGeometry(rows, load_policy(policy), batch)
    hits = np.empty(len(keys), np.uint8)
    simulated.replay(keys, hits, batch)
    for start in range(0, len(keys), batch):
        before = cache.counters().misses
        cache.lookup_arrays(keys[start : start + batch])
        some = hits[start : start + batch]
        assert cache.counters().misses - before == len(some) - int(some.sum())
    assert simulated.entries() == cache.entries()
    found, expected = simulated.counters(), cache.counters()
    assert (found.inserted, found.evicted, found.misses) == (expected.inserted, expected.evicted, expected.misses)
    cache.close()
    store.close()


def test_gpu_geometry_reports_the_hits_of_the_oracle() -> None:
    trace = skewed(600, 80, 3)
    policy = load_policy("lfu")
    oracle = CacheOracle(3, policy, 1, 0.0, primary_in(3), {int(key): np.ones(1, np.float32) for key in trace})
    cache, hits, now = GpuGeometry(30, policy, 16), np.empty(600, np.uint8), 0
    cache.replay(trace, hits, 16)
    for start in range(0, 600, 16):
        batch = trace[start : start + 16]
        assert [oracle.find(int(key)) is not None for key in batch] == hits[start : start + 16].astype(bool).tolist()
        oracle.lookup(batch, now)
        now = oracle.time_after(now, len(batch))


def test_counts_of_a_run_equal_those_of_the_cache_and_of_python(keys: np.ndarray) -> None:
    result = run(keys, "lru", 500, batch=100, warmup=5050, geometry="gpu", bounds=False, dim=3)
    (one,) = result.runs
    assert result.warmup == 5000 and one.requests == 35_000  # whole batches
    cache, hits = GpuGeometry(500, load_policy("lru"), 100), np.empty(len(keys), np.uint8)
    cache.replay(keys[:5000], hits[:5000], 100)
    before = cache.counters()
    cache.replay(keys[5000:], hits[5000:], 100)
    after = cache.counters()
    assert one.hits == hits[5000:].sum() and one.hit_rate == one.hits / 35_000
    assert one.admissions == after.inserted - before.inserted and one.evictions == after.evicted - before.evicted
    assert one.resident == cache.resident() and one.rows == 500
    assert one.row_bytes == 16 and one.bytes_from_host == one.misses * 16 and one.bytes_into_cache == one.admissions * 16
    distinct = distinct_hits = 0
    for start in range(5000, len(keys), 100):
        hit_of = {int(key): int(hit) for key, hit in zip(keys[start : start + 100], hits[start : start + 100])}
        distinct += len(hit_of)
        distinct_hits += sum(hit_of.values())
    assert (one.batch_keys, one.batch_key_hits) == (distinct, distinct_hits)
    assert one.by_window.sum() == hits.sum() and len(one.by_window) == len(result.windows) == 100
    assert result.windows.sum() == len(keys)


def test_batches_larger_than_a_block_are_not_split(monkeypatch: pytest.MonkeyPatch, keys: np.ndarray) -> None:
    whole = [one.hits for one in run(keys, ["lru", "lfu"], 300, batch=1000, warmup=3000).runs]
    monkeypatch.setattr("hps_numba.simulate.dense_trace.BLOCK", 300)
    assert [one.hits for one in run(keys, ["lru", "lfu"], 300, batch=1000, warmup=3000).runs] == whole


# -- what is simulated -------------------------------------------------------------------------------


def test_defaults_include_all_policies_and_bounds(keys: np.ndarray) -> None:
    result = simulate.run(keys, progress=False)
    assert {one.policy for one in result.runs} == {*simulate.DEFAULT_POLICIES, "belady", "infinite"}
    assert {one.geometry for one in result.runs if one.policy == "lru"} == {"gpu", "associative"}
    distinct = len(np.unique(keys))
    (ceiling,) = result.select(policy="infinite")
    assert ceiling.hits == len(keys) - distinct and ceiling.rows == result.distinct == distinct
    for best in result.select(policy="belady"):
        assert best.bound and best.hits <= ceiling.hits
        assert all(one.hits <= best.hits for one in result.select(geometry="associative", rows=best.rows) if not one.bound)
    for runs in result.curves().values():
        assert [one.rows for one in runs] == sorted({one.rows for one in runs})
        rates = [one.hit_rate for one in runs]
        assert all(small <= large + 0.02 for small, large in itertools.pairwise(rates))


def test_policy_from_a_file_equals_policy_from_a_class(tmp_path: Path, keys: np.ndarray) -> None:
    (tmp_path / "simulated.py").write_text(MINE)
    name = f"{tmp_path / 'simulated.py'}:Fading"
    with pytest.raises(PolicyError, match="allow_code=True"):
        run(keys, name, 300)
    from_file = run(keys, [name, "lru"], 300, allow_code=True, bounds=False)
    kind = plugins.load_reference(name, allow_code=True)
    from_class = run(keys, kind, 300, bounds=False)
    rates = {(one.geometry, one.hits) for one in from_file.select(policy="Fading")}
    assert rates == {(one.geometry, one.hits) for one in from_class.runs} and len(rates) == 2
    assert from_file.select(policy="lru")[0].hits not in {hits for _, hits in rates}


def test_unsupported_geometry_is_reported(keys: np.ndarray) -> None:
    result = run(keys, ["arc", "lru"], 300, geometry="gpu")
    assert {one.policy for one in result.runs} == {"lru", "belady", "infinite"}
    assert result.skipped == ("arc: needs one order of all rows, so it is not simulated with geometry gpu",)
    with pytest.raises(ConfigError, match="nothing to simulate: arc"):
        run(keys, "arc", 300, geometry="gpu", bounds=False)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"policies": "lruu"}, PolicyError, "policy: expected one of arc, belady, .*, got 'lruu'"),
        ({"policies": []}, PolicyError, "policies: expected one or more, got none"),
        ({"sizes": "0"}, ConfigError, "sizes: .*, got '0'"),
        ({"geometry": "cpu"}, ConfigError, "geometry: expected one of both, gpu, associative, got 'cpu'"),
        ({"batch": 0}, ConfigError, "batch: expected 1 or more, got 0"),
        ({"warmup": 40_000}, ConfigError, "warmup: expected fewer than the 40,000 requests of the trace, got 40,000"),
        ({"warmup": float("nan")}, ConfigError, "warmup: .*, got nan"),
        ({"sample": 1.5}, ConfigError, "sample: .*, got 1.5"),
        ({"sample": 0.1}, ConfigError, r"sample: expected a share of 0.85 or more, .*, got 0.1, which leaves 30.0 rows"),
        ({"row_dtype": "float33"}, ConfigError, "row_dtype: .*, got 'float33'"),
        ({"trace": np.empty(0, np.int64)}, TraceError, "array: expected keys, got an empty trace"),
        ({"trace": np.ones(3)}, TraceError, "array: expected integer keys, got float64"),
    ],
)
def test_invalid_argument_raises(options: dict[str, Any], kind: type[Exception], message: str, keys: np.ndarray) -> None:
    arguments: dict[str, Any] = {"trace": keys, "policies": "lru", "sizes": 300, **options}
    with pytest.raises(kind, match=message):
        run(arguments.pop("trace"), arguments.pop("policies"), arguments.pop("sizes"), **arguments)


def test_two_policies_with_the_same_name_raise(keys: np.ndarray) -> None:
    first = type("lru", (), {"first": lambda now, count: now, "touch": lambda score, now, count: now})
    with pytest.raises(PolicyError, match="expected one policy for each name, got two different ones called 'lru'"):
        run(keys, ["lru", first], 300)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        (100, [100]),
        ([300, 0.5, 100], [100, 300, 500]),
        ("10k", [10_000]),
        ("5%, 1.5k", [50, 1500]),
        (["1%:100%:3"], [10, 100, 1000]),
        ("1e3", [1000]),
        (np.array([10, 20]), [10, 20]),
        (1.0, [1000]),
        (1, [1]),
        ("0.001%", [1]),
    ],
)
def test_sizes_are_parsed(sizes: Any, rows: list[int]) -> None:
    assert parse_sizes(sizes, 1000) == rows


@pytest.mark.parametrize(
    "sizes", ["", "ten", "-5", -5, 0, 0.0, 2.5, "5:1:3", "1:5", "1:5:1", "200%", True, [], "1:9:x", 1 << 31, None]
)
def test_invalid_sizes_raise(sizes: Any) -> None:
    with pytest.raises(ConfigError, match=r"^sizes: "):
        parse_sizes(sizes, 1000)


def test_one_failure_stops_the_others(monkeypatch: pytest.MonkeyPatch, keys: np.ndarray) -> None:
    """After an interrupt, running simulations stop at their next piece and no other starts."""
    pieces: list[int] = []

    def interrupted(self: GpuGeometry, *args: Any) -> None:
        pieces.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("hps_numba.simulate.dense_trace.BLOCK", 100)
    monkeypatch.setattr("hps_numba.simulate.geometry.GpuGeometry.replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(keys, "lru", "100,200,300,400,500", geometry="gpu", batch=100, threads=2)
    assert 1 <= len(pieces) <= 2  # one a thread


def test_infinite_cache_only(keys: np.ndarray, tmp_path: Path) -> None:
    result = run(keys, "infinite", 300, bounds=False)
    assert [one.policy for one in result.runs] == ["infinite"] and result.sizes == []
    with pytest.raises(ConfigError, match="nothing to draw"):
        simulate.write_page(result, tmp_path / "r.html")


# -- samples -----------------------------------------------------------------------------------------


def test_true_hit_rate_is_within_the_error_of_a_sample() -> None:
    """The true hit rate is within the stated error in nearly all of 24 runs, and the error is small enough to be useful."""
    trace = skewed(300_000, 60_000, 8)
    within = []
    for policies, geometry in ((["lru", "s3fifo", "belady"], "associative"), (["lru", "lfu"], "gpu")):
        arguments = {"geometry": geometry, "batch": 128, "bounds": False}
        whole = run(trace, policies, "4k,12k", **arguments)
        sample = run(trace, policies, "4k,12k", sample=0.15, **arguments)
        assert 0.1 < sample.rate < 0.2 and sample.requests == 300_000 and sample.simulated < 90_000
        assert sample.distinct == pytest.approx(whole.distinct, rel=0.05)
        for true, estimate in zip(whole.runs, sample.runs):
            assert (true.policy, true.rows) == (estimate.policy, estimate.rows) and true.error == 0
            within.append(abs(true.hit_rate - estimate.hit_rate) <= estimate.error)
            assert 0 < estimate.error < 0.06 and abs(true.hit_rate - estimate.hit_rate) < 0.03
    assert sum(within) >= len(within) - 1


def test_sample_keeps_all_requests_of_its_keys() -> None:
    trace = skewed(20_000, 500)
    whole, sample = densify(open_trace(trace)), densify(open_trace(trace), rate=0.3)
    assert set(sample.keys) < set(whole.keys) and sample.requests == 20_000
    assert (sample.keys[sample.ids] == trace[np.isin(trace, sample.keys)]).all()
    assert sample.distinct == pytest.approx(0.3 * whole.distinct, rel=0.25)


# -- dense numbers of keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace",
    [
        [3, 1, 3, 0, 70_000, 1],
        [5, -1, 5, 2**62, -1, 0, -(2**63), 2**63 - 1],
        [*range(40_000), -7, *range(39_999, -1, -1)],  # small keys first, then a large one
        [1 << 25, (1 << 25) - 1, 0],
    ],
)
def test_dense_numbers_follow_first_requests(trace: list[int]) -> None:
    keys = np.array(trace, np.int64)
    dense = densify(open_trace(keys))
    first_seen = list(dict.fromkeys(trace))
    assert dense.keys.tolist() == first_seen and (dense.keys[dense.ids] == keys).all()
    assert dense.counts.tolist() == [trace.count(key) for key in first_seen[:5]] + dense.counts.tolist()[5:]
    assert dense.max_count == max(np.unique(keys, return_counts=True)[1])


def test_dense_numbers_while_the_hash_table_grows() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(-(2**62), 2**62, 150_000)
    keys = np.concatenate([keys, rng.permutation(keys)])
    dense = densify(open_trace(keys))
    assert dense.distinct == 150_000 and (dense.keys[dense.ids] == keys).all()
    assert (dense.future()[:150_000] >= 150_000).all()


def test_large_traces_are_memory_mapped(monkeypatch: pytest.MonkeyPatch, keys: np.ndarray) -> None:
    expected = [one.hits for one in run(keys, ["lru", "belady"], 300).runs]
    monkeypatch.setattr("hps_numba.simulate.dense_trace._IN_MEMORY", 100)
    assert [one.hits for one in run(keys, ["lru", "belady"], 300).runs] == expected
    assert isinstance(densify(open_trace(keys)).ids, np.memmap)


# -- advice ------------------------------------------------------------------------------------------


def test_advice_is_the_smallest_cache_that_reaches_the_target(keys: np.ndarray) -> None:
    found = simulate.advise(keys, 0.7, ["lru", "lfu", "arc"], batch=64, progress=False)
    assert [choice.policy for choice in found.choices] == ["lfu", "lru"] and found.missed == ()
    assert found.best == found.choices[0] and found.choices[0].gpu_bytes < found.choices[1].gpu_bytes
    trace = densify(open_trace(keys))
    settings = Settings(64, found.warmup, len(trace), 32, "float32")
    assert found.warmup == 40_000 // 5 // 64 * 64
    for choice in found.choices:
        one = find_candidate(choice.policy)
        assert replay(one, "gpu", choice.rows, trace, settings).hit_rate == choice.hit_rate >= 0.7
        smaller = choice.rows - max(WAYS, choice.rows // 50 // WAYS * WAYS)
        assert replay(one, "gpu", smaller, trace, settings).hit_rate < 0.7
        assert choice.lookup_seconds == lookup_seconds(64, choice.hit_rate, 32)
    assert "the first 8,000 of 40,000 requests" in found.assumptions[0]
    json.dumps(found.to_dict())


def test_advice_for_an_unreachable_target(keys: np.ndarray) -> None:
    found = simulate.advise(keys, 0.999, ["lru"], progress=False)
    assert found.best is None and found.missed == ("lru",) and 0.8 < found.ceiling < 0.999
    for target, message in ((0, "target_hit_rate: .*, got 0$"), (1.2, "target_hit_rate: .*, got 1.2")):
        with pytest.raises(ConfigError, match=message):
            simulate.advise(keys, target, progress=False)
    with pytest.raises(ConfigError, match=r"policies: .*, got none that a GPU cache can run"):
        simulate.advise(keys, 0.5, ["arc", "belady"], progress=False)


def test_advice_from_a_sample_is_close_to_that_for_the_whole_trace() -> None:
    trace = skewed(200_000, 30_000, 4)
    whole = simulate.advise(trace, 0.7, "lru", progress=False).choices[0]
    sample = simulate.advise(trace, 0.7, "lru", sample=0.2, progress=False)
    assert sample.choices[0].rows == pytest.approx(whole.rows, rel=0.25) and sample.choices[0].error > 0
    assert any("estimates from 0.2 of the keys" in line for line in sample.assumptions)


def test_lookup_times_match_the_measurements() -> None:
    micros = {(1024, 1.0, 32): 21, (16_384, 0.9, 128): 43, (1_048_576, 0.5, 32): 2650, (131_072, 0.95, 128): 108}
    for (batch, hit_rate, dim), expected in micros.items():
        assert lookup_seconds(batch, hit_rate, dim) == pytest.approx(expected * 1e-6)
    assert lookup_seconds(131_072, 0.9, 32) < lookup_seconds(131_072, 0.9, 80) < lookup_seconds(131_072, 0.9, 128)
    assert lookup_seconds(2 << 20, 0.9, 32) == pytest.approx(2 * 540e-6) and lookup_seconds(8, 1, 4) == lookup_seconds(
        1024, 1, 32
    )
    assert lookup_seconds(1024, 0.0, 256) > lookup_seconds(1024, 0.5, 256) == pytest.approx(78e-6)
    rates = [lookup_seconds(1 << 20, rate, 64) for rate in (0.0, 0.2, 0.5, 0.7, 0.9, 0.95)]
    assert rates == sorted(rates, reverse=True)


# -- results -----------------------------------------------------------------------------------------


def test_json_and_csv_contain_the_results(tmp_path: Path, keys: np.ndarray) -> None:
    result = run(keys, ["lru"], "100,300")
    result.write_json(tmp_path / "r.json")
    result.write_csv(tmp_path / "r.csv")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content == json.loads(json.dumps(result.to_dict()))
    assert content["requests"] == 40_000 and len(content["heat"]) == len(content["group_keys"])
    assert [one["hit_rate"] for one in content["runs"]] == [one.hit_rate for one in result.runs]
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["policy"], int(line["rows"]), float(line["hit_rate"])) for line in lines] == [
        (one.policy, one.rows, one.hit_rate) for one in result.runs
    ]
    assert {line["trace"] for line in lines} == {"array"} and "by_window" not in lines[0]


def test_heat_shows_a_shift_of_traffic_to_other_keys() -> None:
    steady = run(skewed(50_000, 300), "lru", 30).heat
    assert np.allclose(steady.mean(1), 1, atol=0.1) and steady.std() < 0.3
    turned = np.concatenate([skewed(25_000, 300), 10**9 + skewed(15_000, 300)])
    result = run(turned, "lru", 30)
    assert result.group_keys.sum() == 600 and len(result.heat) <= 12
    assert result.heat[0, : len(result.windows) // 2].mean() > 1.4 and result.heat[0, -20:].mean() < 0.3
