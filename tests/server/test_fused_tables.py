"""Tables of a model that are looked up together: which share a launch, and what a server answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.internals import served_model
from support.oracles import assert_same_bits, rows_of
from support.services import DEFAULT, Service, cache_of, stats_of

import hps_numba
from hps_numba.errors import ClosedError, UnknownModelError
from hps_numba.kernels.layouts.cache import MAX_TABLES
from hps_numba.server import fused_tables
from hps_numba.server.fused_tables import FusedLookup
from hps_numba.server.table import ServedTable

DIM = 17
ROWS = range(200)


def fused(server: hps_numba.HPS, tables: Any, device: int | None = None) -> FusedLookup | None:
    model = served_model(server)
    return model.groups.on(device, [model.table(table) for table in tables])  # type: ignore[arg-type]


def test_tables_of_one_width_share_a_launch(on_cpu: Service) -> None:
    server = on_cpu.open((ROWS, DIM), (ROWS, 3), (ROWS, DIM), (ROWS, 3), (ROWS, DIM), (ROWS, 1))
    assert fused(server, range(6)).launches == 3
    assert fused(server, [0, 2, 4]).launches == 1
    assert fused(server, [5]).launches == 1
    assert fused(server, [0, 2, 4]) is fused(server, [0, 2, 4])


def test_a_table_asked_for_twice_takes_two_launches(on_cpu: Service) -> None:
    server = on_cpu.open((ROWS, DIM), (ROWS, DIM))
    assert fused(server, [0, 1, 0]).launches == 2
    assert fused(server, [0, 0, 0]).launches == 3


def test_a_launch_takes_at_most_max_tables(on_cpu: Service) -> None:
    server = on_cpu.open(*[(range(3), 3)] * (MAX_TABLES + 2), gpucacheper=1.0)
    assert fused(server, range(MAX_TABLES)).launches == 1
    assert fused(server, range(MAX_TABLES + 1)).launches == 2


def test_caches_of_different_policies_do_not_share_a_launch(on_cpu: Service) -> None:
    server = on_cpu.open(*[(ROWS, DIM)] * 3, cache_policy=["lru", "lfu", "lru"])
    assert fused(server, range(3)).launches == 2


def test_tables_without_caches_or_with_slower_tiers_are_not_fused(on_cpu: Service) -> None:
    server = on_cpu.open((ROWS, DIM), (ROWS, DIM), gpucache=False)
    assert fused(server, [0, 1]) is None
    cold, _ = on_cpu.open_cold()
    assert fused(cold, [0]) is None
    assert fused(server, []) is None


def test_selections_beyond_the_maximum_are_looked_up_table_by_table(on_cpu: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_tables, "MAX_SELECTIONS", 2)
    server = on_cpu.open(*[(ROWS, DIM)] * 3)
    assert [fused(server, some).launches for some in ([0, 1], [1, 2], [0, 2], [0, 1, 2])] == [1, 1, 2, 3]
    fused_lookup = fused(server, [0, 1, 2])
    keys, outs = [np.arange(5) * (table + 1) for table in range(3)], [np.empty((5, DIM), np.float32) for _ in range(3)]
    fused_lookup.lookup([some.ctypes.data for some in keys], [5] * 3, [out.ctypes.data for out in outs], 0)
    for table, out in enumerate(outs):
        assert_same_bits(out, rows_of(keys[table], DIM))


@pytest.mark.parametrize("tables", [[0, 2, 4], [0, 1, 2, 0]])
def test_evenly_spaced_keys_of_tables(on_cpu: Service, tables: list[int]) -> None:
    server = on_cpu.open(*[(ROWS, DIM)] * 5)
    fused_lookup = fused(server, tables)
    keys = np.random.default_rng(1).integers(0, 300, (len(tables), 40))
    out = np.empty((len(tables), 40, DIM), np.float32)
    for _ in range(2):
        fused_lookup.lookup_stacked(keys.ctypes.data, keys.strides[0], 40, out.ctypes.data, out.strides[0], 0)
        for table, some, rows in zip(tables, keys, out, strict=True):
            assert_same_bits(rows, server.lookup(some, "m", table))
        out[:] = 0


def test_fused_lookups_of_a_closed_server_raise_closed_error(on_cpu: Service) -> None:
    server = on_cpu.open((ROWS, DIM), (ROWS, DIM))
    fused_lookup = fused(server, [0, 1])
    model = served_model(server)
    server.close()
    with pytest.raises(ClosedError):
        fused_lookup.lookup([0, 0], [1, 1], [0, 0], 0)
    with pytest.raises(ClosedError):
        fused_lookup.lookup_stacked(0, 8, 1, 0, 4 * DIM, 0)
    with pytest.raises(ClosedError, match="closed"):
        model.groups.on(None, list(model.tables))  # type: ignore[arg-type]


def test_switching_a_policy_retires_the_fused_lookups_of_its_table(on_cpu: Service) -> None:
    server = on_cpu.open((ROWS, DIM), (ROWS, DIM), (ROWS, DIM))
    all_three, others = fused(server, range(3)), fused(server, [1, 2])
    server.set_policy("sieve", "m", 0)
    assert fused(server, range(3)).launches == 2  # the policies differ
    assert fused(server, [1, 2]) is others
    with pytest.raises(ClosedError):
        all_three.lookup([0] * 3, [1] * 3, [0] * 3, 0)
    server.set_policy("sieve", "m")
    fused_lookup = fused(server, range(3))
    assert fused_lookup.launches == 1
    keys, outs = [np.arange(50) + table for table in range(3)], [np.empty((50, DIM), np.float32) for _ in range(3)]
    for _ in range(2):
        fused_lookup.lookup([some.ctypes.data for some in keys], [50] * 3, [out.ctypes.data for out in outs], 0)
        for some, out in zip(keys, outs):
            assert_same_bits(out, rows_of(some, DIM))


def test_tables_whose_policy_counts_requests_are_not_fused(on_cpu: Service) -> None:
    server = on_cpu.open((ROWS, DIM), (ROWS, DIM), cache_policy="tinylfu")
    assert fused(server, [0, 1]).launches == 2


# -- in a server -------------------------------------------------------------------------------------------------------


def test_lookup_many_returns_the_rows_of_every_table(service: Service) -> None:  # G34, G39
    dims = (DIM, 3, DIM)
    starts = (0, 1000, 2000)  # each table has keys of its own
    server = service.open(*[(range(start, start + 200), dim) for start, dim in zip(starts, dims)], gpucacheper=0.3)
    random = np.random.default_rng(0)
    for n in (1, 50, 700, 50):
        keys = [start + random.integers(0, 220, (n, 2)) for start in starts]
        answers = server.lookup_many([service.keys(some) for some in keys], "m")
        for table, (some, rows) in enumerate(zip(keys, answers, strict=True)):
            rows, has = service.on_host(rows), some < starts[table] + 200
            assert rows.shape == (n, 2, dims[table])
            assert_same_bits(rows[has], rows_of(some[has], dims[table]))
            assert (rows[~has] == DEFAULT - np.float32(table)).all()
    assert [stats_of(server, table).keys for table in range(3)] == [2 * (1 + 50 + 700 + 50)] * 3
    assert cache_of(server).misses > 0


@pytest.mark.gpu
def test_gpu_lookup_many_uses_one_launch_for_tables_of_one_width(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # G31, G34
    service = Service(workshop, 0)
    server = service.open(*[(ROWS, DIM)] * 4)
    keys = [service.keys(range(table, table + 9)) for table in range(4)]
    server.lookup_many(keys, "m")
    single = []
    monkeypatch.setattr(ServedTable, "lookup_cached", lambda *args: single.append(args))
    for table, rows in enumerate(server.lookup_many(keys, "m")):
        assert_same_bits(rows.get(), rows_of(range(table, table + 9), DIM))
    assert not single
    assert fused(server, range(4), device=0).launches == 1


@pytest.mark.gpu
def test_gpu_lookup_many_is_exact_across_policy_switches(workshop: Any) -> None:
    torch = pytest.importorskip("torch")
    service = Service(workshop, 0)
    server = service.open(*[(ROWS, DIM)] * 3, gpucacheper=0.3)
    keys = [torch.arange(table, table + 90, device="cuda") for table in range(3)]
    for policy in ("sieve", "lfu", "tinylfu", "lru"):
        for _ in range(2):
            for some, rows in zip(keys, server.lookup_many(keys, "m"), strict=True):
                assert_same_bits(rows.cpu().numpy(), rows_of(some.cpu().numpy(), DIM))
                assert torch.equal(server.lookup(some, "m", 0), rows)
        server.set_policy(policy, "m")


@pytest.mark.gpu
def test_gpu_lookup_many_takes_mixed_and_empty_keys(workshop: Any) -> None:
    service = Service(workshop, 0)
    server = service.open(*[(ROWS, DIM)] * 3)
    some = server.lookup_many([service.keys([]), service.keys([[5]]), service.keys(range(4))], "m")
    assert [rows.shape for rows in some] == [(0, DIM), (1, 1, DIM), (4, DIM)]
    assert_same_bits(some[1].get()[0], rows_of([5], DIM))
    mixed = server.lookup_many([[7], service.keys([8], np.int32), service.keys([9])], "m")
    for table, rows in enumerate(mixed):
        assert_same_bits(service.on_host(rows), rows_of([7 + table], DIM))
    with pytest.raises(UnknownModelError, match="no table 3"):
        server.lookup_many([service.keys([1])] * 4, "m")
    server.update([8], np.full((1, DIM), 5.0), "m", 1)
    fresh = server.lookup_many([service.keys([8])] * 3, "m")
    assert (fresh[1].get() == 5).all()
    assert_same_bits(fresh[2].get(), rows_of([8], DIM))
