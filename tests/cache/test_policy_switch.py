"""A user's own policy: from a file, a module or code, in a cache that serves, and in the next process without a compiler."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cache_bench import Bench, ints
from support.cache_oracle import CacheOracle, SketchOracle
from support.cache_pairs import Pair
from support.compiled_kernels import end, start
from support.docs import block_with
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.policies import policy_for
from support.services import Service
from support.waiting import Span, join_all

import hps_numba
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.errors import ClosedError, ConfigError, PolicyError, UnknownModelError
from hps_numba.kernels.cache.sketch import sketch_places
from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.policies._load import load_policy
from hps_numba.kernels.policies._policy import Policy

DECAY = block_with("policies.md", "# my_policy.py")


class Newest:
    """In, and never touched: its kernels are those of fifo, but not its name."""

    def first(now, count):
        return now

    def touch(score, now, count):
        return score


# -- a cache ------------------------------------------------------------------------------------


def follow(oracle: CacheOracle, policy: Policy, now: int) -> None:
    """What ``set_policy`` does, to the oracle."""
    oracle.policy = policy
    oracle.told = 64 * oracle.inserted
    oracle.states = [[0] * policy.state for _ in oracle.states]
    for at in map(tuple, np.argwhere(oracle.occupied)):
        key = (int(oracle.keys[at]),) if policy.takes_key else ()
        oracle.scores[at] = policy.first(now, 1, *key) % 2**32


def test_rows_stay_when_the_policy_changes(bench: Bench) -> None:
    pair = Pair(bench, "lru", 1, seed=4)
    requests = 0
    for name in ("lru", "tinylfu", "lfu", "sieve", "pinned", "tinylfu", "lru"):
        keys = [entry.key for entry in pair.cache.entries()]
        policy = policy_for(name)
        pair.cache.set_policy(policy)
        assert [entry.key for entry in pair.cache.entries()] == keys
        follow(pair.oracle, policy, pair.now)
        pair.oracle.sketch = SketchOracle(30, host_function(sketch_places)) if policy.admit is not None else None
        if pair.oracle.sketch is not None:
            pair.oracle.sketch.requests = pair.cache.counters().keys  # the clock of forgetting goes on
        pair.check()
        for _ in range(20):
            pair.lookup()
            pair.check()
        requests = pair.cache.counters().keys
    assert requests > 2000 and pair.oracle.evictions > 50


def test_lookups_stay_exact_while_policies_change(bench: Bench) -> None:
    keys = np.arange(400)
    cache = bench.cache(bench.store(keys, 1), policy="lru", set_count=10, buffers=3)
    policies = [policy_for(name) for name in ("lfu", "sieve", "tinylfu", "lru")]
    for policy in policies:
        cache.set_policy(policy)  # what is compiled is compiled
        cache.lookup_arrays(keys)
    problems: list[Any] = []
    batches, changes = [0, 0, 0], [0]
    span = Span(3, lambda: changes[0] > 10 and min(batches) > 10)

    def look_up(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while span.goes_on() and not problems:
                some = rng.integers(0, 450, 100)
                rows = cache.lookup_arrays(some)
                known = some < 400
                assert_same_bits(rows[known], rows_of(some[known], 1))
                assert (rows[~known] == np.float32(-7.5)).all()
                batches[number] += 1
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=look_up, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while span.goes_on() and not problems:
        cache.set_policy(policies[changes[0] % len(policies)])
        changes[0] += 1
        time.sleep(0.002)
    join_all(*threads)
    assert not problems, problems[0]
    assert changes[0] > 10 and min(batches) > 10
    held = cache.dump()
    assert len(held) == len(set(held.tolist())) > 50


def test_policy_stays_if_another_does_not_compile(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(50), 1), policy="lru", set_count=2)
    cache.lookup_arrays(ints(range(50)))

    def senseless(scores: Any, state: Any) -> int:
        return scores.missing  # type: ignore[no-any-return]

    lru = load_policy("lru")
    broken = Policy("broken", lru.first, lru.touch, False, "3" * 32, victim=senseless, state=1)
    before = cache.entries()
    with pytest.raises(PolicyError, match=r"policy 'broken', senseless \(.*:\d+\): does not compile for the CPU: "):
        cache.set_policy(broken)
    assert cache.policy == lru and cache.entries() == before
    assert_same_bits(cache.lookup_arrays(ints(range(50))), rows_of(ints(range(50)), 1))


def test_policy_stays_without_memory_for_another(
    cpu_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(50), 1), policy="lru", set_count=2)

    def full(size: int, purpose: str) -> Any:
        raise hps_numba.CapacityError(f"{purpose}: no memory for {size} bytes")

    cache.lookup_arrays(ints(range(50)))
    with monkeypatch.context() as patch, pytest.raises(hps_numba.CapacityError, match="frequency sketch"):
        patch.setattr(cache.backend, "allocate", full)
        cache.set_policy(load_policy("tinylfu"))
    assert cache.policy == load_policy("lru")
    assert_same_bits(cache.lookup_arrays(ints(range(50))), rows_of(ints(range(50)), 1))


def test_fixed_and_closed_caches_refuse_a_policy(cpu_bench: Bench) -> None:
    fixed = cpu_bench.cache(cpu_bench.store(range(5), 1), 5, kind="static")
    with pytest.raises(ConfigError, match="expected a dynamic cache, got a static one"):
        fixed.set_policy(load_policy("lfu"))
    closed = cpu_bench.cache(None, 20)
    closed.close()
    with pytest.raises(ClosedError, match="the cache is closed"):
        closed.set_policy(load_policy("lfu"))


def test_compiling_a_policy_does_not_undo_a_change_meanwhile(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(40), 1), set_count=2)
    kernels = cache.parts.kernels
    compile_now, changed = cache.backend.ready_kernel, []

    def change_meanwhile(spec: Any) -> Any:
        if not changed:
            changed.append(True)
            cache.set_policy(load_policy("lfu"))
            changed.append(kernels.made["insert_kernel",])
        return compile_now(spec)

    monkeypatch.setattr(cache.backend, "ready_kernel", change_meanwhile)
    cache.compile_policy()
    assert cache.policy.name == "lfu" and kernels.made["insert_kernel",] is changed[1]


def test_capture_after_close_is_refused(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another thread closes the cache while the lookup is on its way."""
    keys, out = np.arange(40), np.empty((40, 1), np.float32)
    cache = cpu_bench.cache(cpu_bench.store(keys, 1), set_count=2)
    monkeypatch.setattr(cache.parts.lifecycle, "begin", cache.close)
    with pytest.raises(ClosedError, match="the cache is closed"):
        cache.lookup(keys.ctypes.data, 40, out.ctypes.data, 0, capturing=True)
    assert not cache.parts.workspaces.captured


def test_graph_keeps_the_policy_it_was_captured_with(cpu_bench: Bench) -> None:
    """The CPU has no graphs: a captured call keeps its workspace, and here the kernels that a graph would keep too."""
    keys = np.arange(40)
    cache = cpu_bench.cache(cpu_bench.store(keys, 1), policy="tinylfu", set_count=2)
    out = np.empty((40, 1), np.float32)
    cache.lookup(keys.ctypes.data, 40, out.ctypes.data, 0, capturing=True)
    (workspace,) = cache.parts.workspaces.captured
    kernels = cache.parts.kernels
    captured = kernels.policy, dict(kernels.made)
    size = cache.parts.workspaces.policy_memory.bytes
    cache.set_policy(load_policy("sieve"))
    assert [memory.bytes for memory in cache.parts.workspaces.of_graphs] == [size]
    cache.set_policy(load_policy("lru"))
    now = kernels.policy, kernels.made
    kernels.adopt(*captured)
    cache.parts.lookups.batch(workspace, keys.ctypes.data, 40, out.ctypes.data, 0, ("int64", "float32", False))
    kernels.adopt(*now)
    assert_same_bits(out, rows_of(keys, 1))
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, 1))


@pytest.mark.gpu
def test_graph_is_replayed_while_policies_change() -> None:
    torch = pytest.importorskip("torch")
    made = Bench(0)
    keys = np.arange(3000)
    cache = EmbeddingCache(4, 500, device=0, policy=policy_for("SecondChance"), store=made.store(keys, 4), default=-7.5)
    stream = torch.cuda.Stream()
    asked = torch.zeros(256, dtype=torch.int64, device="cuda")
    out = torch.empty((256, 4), device="cuda")
    with torch.cuda.stream(stream):
        cache.lookup(asked.data_ptr(), 256, out.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cache.lookup(asked.data_ptr(), 256, out.data_ptr(), stream.cuda_stream, capturing=True)
    rng = np.random.default_rng(2)
    for step in range(200):
        if step % 20 == 10:
            cache.set_policy(policy_for(("lru", "sieve", "tinylfu", "lfu", "SecondChance")[step // 20 % 5]))
        batch = rng.integers(0, 3000, 256)
        asked.copy_(torch.from_numpy(batch))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out.cpu().numpy(), rows_of(batch, 4))
        assert_same_bits(cache.lookup_arrays(batch[:50]), rows_of(batch[:50], 4))
    del graph
    cache.close()
    made.close()


# -- a server -----------------------------------------------------------------------------------


def cache_of(server: hps_numba.HPS, service: Service, table: int = 0, model: str = "m") -> EmbeddingCache:
    caches = server._catalog.models[model].tables[table].caches
    assert caches is not None
    cache = caches.on(service.device)
    assert cache is not None
    return cache


def check_rows(server: hps_numba.HPS, service: Service, table: int = 0) -> None:
    keys = np.random.default_rng(3).integers(0, 300, 200)
    for _ in range(2):
        assert_same_bits(service.lookup(server, keys, table), rows_of(keys, 1))


TABLES = ((range(300), 1), (range(300), 1))


def test_each_table_may_have_a_policy_from_a_file_or_a_module(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my_policy.py").write_text(DECAY)
    (tmp_path / "policies_of_mine.py").write_text(DECAY.replace("HALF_LIFE = 512", "HALF_LIFE = 64"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["my_policy.py:Decay", "policies_of_mine:Decay"]
    with pytest.raises(PolicyError, match="runs code from a file: pass allow_code=True"):
        service.open(*TABLES, cache_policy=names, gpucacheper=0.3)
    server = service.open(*TABLES, cache_policy=names, gpucacheper=0.3, allow_code=True)
    assert [cache_of(server, service, table).policy.name for table in (0, 1)] == names
    assert ("insert_kernel",) in cache_of(server, service).parts.kernels.made  # compiled, or refused, at the start
    for table in (0, 1):
        check_rows(server, service, table)
    digests = {cache_of(server, service, table).policy.digest for table in (0, 1)}
    assert len(digests) == 2


def test_edited_policy_file_can_be_set_again(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_policy.py").write_text(DECAY)
    server = service.open(*TABLES, cache_policy="my_policy.py:Decay", gpucacheper=0.3, allow_code=True)
    check_rows(server, service)
    before = cache_of(server, service).policy
    assert server.set_policy("my_policy.py:Decay", "m", 0) == "my_policy.py:Decay"
    assert cache_of(server, service).policy == before
    (tmp_path / "my_policy.py").write_text(DECAY.replace("HALF_LIFE = 512", "HALF_LIFE = 64"))
    server.set_policy("my_policy.py:Decay", "m", 0)
    assert cache_of(server, service).policy.digest != before.digest
    assert cache_of(server, service, 1).policy == before
    check_rows(server, service)
    (tmp_path / "my_policy.py").write_text(DECAY.replace("def touch(score", "def touch(sore"))
    with pytest.raises(
        PolicyError, match=r"my_policy\.py:\d+\): expected touch\(score, now, count\), got \(sore, now, count\)"
    ):
        server.set_policy("my_policy.py:Decay", "m", 0)
    check_rows(server, service)


def test_policies_set_by_name_as_a_class_and_as_a_decorator(service: Service) -> None:
    server = service.open(*TABLES, gpucacheper=0.3)
    check_rows(server, service)
    rows = {entry.key for entry in cache_of(server, service).entries()}
    assert server.set_policy("sieve", "m") == "sieve"
    assert [cache_of(server, service, table).policy.name for table in (0, 1)] == ["sieve", "sieve"]
    assert server.set_policy(Newest, "m", "sparse_embedding1") is Newest
    assert [cache_of(server, service, table).policy.name for table in (0, 1)] == ["sieve", "Newest"]

    @server.set_policy(model_name="m", table_id=0)
    class Mine(Newest):
        pass

    assert isinstance(Mine, type) and Mine.first is Newest.first
    assert cache_of(server, service).policy.name == "Mine"
    assert {entry.key for entry in cache_of(server, service).entries()} == rows
    for table in (0, 1):
        check_rows(server, service, table)
    server.replace_model("m")
    assert cache_of(server, service).policy.name == "Mine"
    check_rows(server, service)


def test_invalid_policy_is_refused_and_the_one_before_stays(on_cpu: Service) -> None:
    server = on_cpu.open(*TABLES, gpucacheper=0.3)
    with pytest.raises(PolicyError, match="did you mean 'sieve'"):
        server.set_policy("seive", "m")
    with pytest.raises(PolicyError, match=r"'my\.py:Mine' runs code from a file: pass allow_code=True"):
        server.set_policy("my.py:Mine", "m")
    with pytest.raises(PolicyError, match="policy 'int': expected a class with first and touch, got a int"):
        server.set_policy(3, "m")
    with pytest.raises(UnknownModelError, match="'n' is not deployed"):
        server.set_policy("lfu", "n")
    with pytest.raises(UnknownModelError, match="has no table 2"):
        server.set_policy("lfu", "m", 2)
    assert {cache.policy.name for table in (0, 1) for cache in [cache_of(server, on_cpu, table)]} == {"lru"}
    check_rows(server, on_cpu)


def test_policy_for_tables_without_caches_warns_and_changes_nothing(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    server = workshop.open(workshop.model((range(9), 1)))
    with caplog.at_level(logging.WARNING):
        server.set_policy(Newest, "m")
    assert caplog.records[-1].getMessage().endswith("cache policy 'Newest' without effect: there is no cache")
    assert_same_bits(server.lookup(np.arange(9), "m", 0), rows_of(np.arange(9), 1))


def test_static_caches_refuse_a_policy(on_cpu: Service) -> None:
    server = on_cpu.open(TABLES[0], embedding_cache_type="static")
    with pytest.raises(ConfigError, match="expected a dynamic cache, got a static one"):
        server.set_policy("lfu", "m")


# -- the next process -----------------------------------------------------------------------------

EVERYTHING = block_with("policies.md", "class SecondChance").partition("\n\n\nserver")[0]

USED = """
import json, sys
import numpy as np
from numba.core import event
seen = event.RecordingListener()
event.register("numba:compile", seen)
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.kernels.policies._load import load_policy
from hps_numba.storage.host.store import HostStore
policy = load_policy(sys.argv[1], allow_code=True)
store = HostStore(1)
store.upsert(np.arange(100), np.arange(100, dtype=np.float32)[:, None])
cache = EmbeddingCache(1, 20, device=None, policy=policy, store=store)
right = all((cache.lookup_arrays(np.arange(100))[:, 0] == np.arange(100)).all() for _ in range(3))
print(json.dumps({"compiled": len(seen.buffer), "right": bool(right), "evicted": cache.counters().evicted}))
"""


def test_policy_in_a_file_compiles_nothing_in_a_second_process(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(EVERYTHING)
    first, second = (end(start(USED, f"{file}:SecondChance")) for _ in range(2))  # in the folder of the user, as other tests
    assert second["compiled"] == 0
    assert first["right"] and second["right"] and first["evicted"] == second["evicted"] > 0
    before = load_policy(f"{file}:SecondChance", allow_code=True)
    file.write_text(EVERYTHING.replace("(3, 5, 8)", "(3, 5, 9)"))
    assert load_policy(f"{file}:SecondChance", allow_code=True).digest != before.digest
