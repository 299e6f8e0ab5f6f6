"""What every cache policy has to do (``hps_numba.Policy``)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.policies._functions import for_compiler
from hps_numba.kernels.policies._load import as_policy, load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.kernels.policies._probes import check_compiled, check_plain
from hps_numba.server.hps import HPS
from hps_numba.storage.model_files import write_model
from hps_numba.testing._rows import assert_same_bits, rows_of

__all__ = ["PolicyContract"]

_LOW32 = 2**32 - 1
_ROWS, _DIM = 300, 17


class PolicyContract:
    """Subclass it and set ``policy`` to the class under test, a built-in name, ``module:NAME`` or ``file.py:NAME``.

    Or override the fixture ``loaded``, which gives the ``Policy``, to run the suite over several.
    """

    policy: ClassVar[Any]

    @pytest.fixture
    def loaded(self) -> Policy:
        return load_policy(self.policy, allow_code=True) if isinstance(self.policy, str) else as_policy(self.policy)

    def test_it_answers_what_a_cache_may_ask(self, loaded: Policy) -> None:
        """Integers in range, the same when touched twice at a time, and the same when compiled."""
        check_plain(loaded)
        check_compiled(loaded)

    def test_plain_and_compiled_agree(self, loaded: Policy) -> None:
        first, touch = (host_function(for_compiler(function)) for function in (loaded.first, loaded.touch))
        source = random.Random(5)
        for _ in range(500):
            now, count = source.getrandbits(source.randint(1, 48)), source.randint(1, 2**31 - 1)
            score = (now - source.randint(0, 20)) & _LOW32 if source.random() < 0.5 else source.getrandbits(32)
            asked = (now, count, source.getrandbits(62)) if loaded.takes_key else (now, count)
            assert first(*asked) & _LOW32 == loaded.first(*asked) & _LOW32
            assert touch(score, now, count) & _LOW32 == loaded.touch(score, now, count) & _LOW32

    def test_a_cache_that_evicts_by_it_serves_the_right_rows(self, loaded: Policy, tmp_path: Path) -> None:
        """On a GPU if there is one, else in host memory."""
        write_model(tmp_path / "table", _DIM, [(np.arange(_ROWS), rows_of(np.arange(_ROWS), _DIM))])
        model = {
            "model": "m",
            "sparse_files": [str(tmp_path / "table")],
            "embedding_vecsize_per_table": [_DIM],
            "maxnum_catfeature_query_per_table_per_sample": [1],
            "default_value_for_each_table": [-1.0],
            "deployed_device_list": [0],
            "max_batch_size": 64,
            "gpucacheper": 0.2,
        }
        with HPS({"models": [model], "cache_on_cpu": True}, progress=False) as server:
            server.set_policy(loaded, "m")
            rng = np.random.default_rng(0)
            for _ in range(20):
                keys = rng.zipf(1.3, 64) % (_ROWS + 5)
                expected = np.where((keys < _ROWS)[:, None], rows_of(keys, _DIM), np.float32(-1))
                assert_same_bits(server.lookup(keys, "m", 0), expected)
            (cache,) = server.stats()["m"]["sparse_embedding0"].caches
            assert cache.resident <= cache.capacity and cache.policy == loaded.name
