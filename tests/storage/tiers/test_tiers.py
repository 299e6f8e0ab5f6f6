"""The contract of a storage tier, run over every tier of the package, one of a test's own, and the wrappers around them."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.clocks import stop_clock
from support.fakes import DictTier
from support.oracles import assert_same_bits, rows_of
from support.tiers import DIM, IN_MEMORY, PACKAGE, TAG, fetch, ints

from hps_numba import plugins
from hps_numba.config import PersistentDatabaseConfig, VolatileDatabaseConfig
from hps_numba.errors import TierError
from hps_numba.storage.tiers._tier import NO_LIMIT, Tier
from hps_numba.storage.tiers._wrappers import CountingTier, FlakyTier, SlowTier, WrapperTier
from hps_numba.storage.tiers.hash_map import HashMapTier
from hps_numba.testing import TierContract
from hps_numba.testing.tiers import MakeTier


def section_for(kind: type[Tier], folder: Path, **options: Any) -> Any:
    if kind.persistent:
        return PersistentDatabaseConfig(path=tempfile.mkdtemp(dir=folder), **options)
    if kind.shared:  # a segment of its own each
        options = {"shared_memory_name": f"hps_test_{uuid.uuid4().hex}", "shared_memory_size": 16 << 20, **options}
    return VolatileDatabaseConfig(**options)


def make_wrapped(wrap: Callable[[Tier], Tier]) -> Callable[..., Tier]:
    return lambda section, wide_keys=True: wrap(HashMapTier(section, wide_keys=wide_keys))


#: tiers that need a server: the test of each runs the contract
SERVED = {"redis_cluster"}
CANDIDATES: dict[str, Any] = {
    **{name: plugins.load(PACKAGE, name) for name in plugins.names(PACKAGE) if name not in SERVED},
    "a dict": DictTier,
    "WrapperTier": make_wrapped(WrapperTier),
    "CountingTier": make_wrapped(CountingTier),
    "SlowTier": make_wrapped(lambda inner: SlowTier(inner, 0.0)),
    "FlakyTier": make_wrapped(lambda inner: FlakyTier(inner, set())),
}


def test_every_file_of_the_folder_is_tested() -> None:  # D05, D09
    files = {path.stem for path in Path(plugins.__file__).parent.glob("storage/tiers/*.py") if not path.stem.startswith("_")}
    assert files == set(plugins.names(PACKAGE))
    assert files >= set(IN_MEMORY)
    assert all(issubclass(CANDIDATES[name], Tier) for name in files - SERVED)
    assert all("(TierContract)" in (Path(__file__).parent / f"test_{name}.py").read_text() for name in SERVED)


class TestEveryTier(TierContract):  # D05, D06, D07, D09, N06
    """All of them, and the wrappers around one."""

    @pytest.fixture(params=CANDIDATES)
    def make_tier(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTier]:
        candidate = CANDIDATES[request.param]
        made: list[Tier] = []

        def one(*, wide_keys: bool = True, **options: Any) -> Tier:
            kind = candidate if isinstance(candidate, type) else HashMapTier
            options = {"max_batch_size": 4, **options}
            made.append(candidate(section_for(kind, tmp_path, **options), wide_keys=wide_keys))
            return made[-1]

        yield one
        for tier in made:
            tier.close()


class TestByOptions(TierContract):
    """The same, opened without a config."""

    tier = HashMapTier

    def options(self, folder: Path) -> dict[str, Any]:
        return {"num_partitions": 2}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_capacity_is_margin_times_partitions_or_none(name: str) -> None:  # D05
    make = plugins.load(PACKAGE, name).from_options
    assert make().capacity(TAG) == NO_LIMIT
    assert DictTier.from_options().capacity(TAG) == NO_LIMIT
    assert make(overflow_margin=5, num_partitions=3).capacity(TAG) == 15
    assert make(overflow_margin=2**63, num_partitions=4).capacity(TAG) == NO_LIMIT


# --- the wrappers -----------------------------------------------------------------------------------------------------


def held(inner: Tier) -> Tier:
    inner.insert(TAG, ints(*range(9)), rows_of(range(9), DIM))
    return inner


def test_counting_tier_counts_calls_and_keys() -> None:
    tier = CountingTier(held(DictTier(VolatileDatabaseConfig())))
    fetch(tier, TAG, ints(1, 2, 99))
    fetch(tier, TAG, ints(1))
    tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
    tier.contains(TAG, ints(1))
    tier.erase(TAG, ints(4, 5))
    tier.erase(TAG)
    assert tier.calls == {"fetch": 2, "insert": 1, "contains": 1, "erase": 2}
    assert tier.keys == {"fetch": 4, "insert": 2, "contains": 1, "erase": 2}


def test_slow_tier_stops_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:  # D07
    tier = SlowTier(held(DictTier(VolatileDatabaseConfig(max_batch_size=2))), 10.0)
    stop_clock(monkeypatch, 0.0)
    rows = np.full((9, DIM), np.nan, np.float32)
    answer = tier.fetch(TAG, ints(*range(9)), rows, deadline=25.0)  # batches begin at 0, 10 and 20
    assert (answer.asked, answer.found.tolist()) == (6, [True] * 6 + [False] * 3)
    assert_same_bits(rows[:6], rows_of(range(6), DIM))
    assert np.isnan(rows[6:]).all()


def test_flaky_tier_fails_for_the_named_calls() -> None:
    tier = FlakyTier(held(DictTier(VolatileDatabaseConfig())), {"fetch"})
    with pytest.raises(TierError, match="fetch: failed on purpose"):
        fetch(tier, TAG, ints(1))
    assert tier.insert(TAG, ints(50), rows_of([50], DIM)) == 1
    tier.fail_on.clear()
    assert fetch(tier, TAG, ints(1, 50))[0].found.all()
