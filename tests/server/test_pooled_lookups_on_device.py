"""``HPS.lookup_pooled`` where the keys are: bags in the memory of a GPU against the same bags in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of

from hps_numba.errors import ArrayError, ConfigError, DeviceError, UnknownModelError

DIM = 16
COMBINERS = ("sum", "mean", "sqrtn", "max")
ToDevice = Any


@pytest.fixture(params=[pytest.param(None, id="cpu"), pytest.param(0, id="gpu", marks=pytest.mark.gpu)])
def to_device(request: pytest.FixtureRequest) -> ToDevice:
    """Leaves arrays in host memory, or copies them to the memory of a GPU."""
    if request.param is None:
        return np.asarray
    cupy = pytest.importorskip("cupy")
    return cupy.asarray


def on_host(rows: Any) -> np.ndarray:
    return rows if isinstance(rows, np.ndarray) else rows.get()


@pytest.fixture
def server(workshop: Any) -> Any:
    return workshop.open(workshop.model((range(500), DIM), deployed_device_list=[0]))


def bags(seed: int, count: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(random.integers(0, 9, count)))).astype(np.int64)
    n = offsets[-1]
    return random.integers(-5, 505, n), offsets, random.uniform(0.1, 2, n).astype(np.float32)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_pooling_where_the_keys_are_equals_pooling_in_host_memory(server: Any, to_device: ToDevice, combiner: str) -> None:
    keys, offsets, weights = bags(1)
    for some in (None, weights):
        expected = server.lookup_pooled(keys, offsets, "m", 0, weights=some, combiner=combiner)
        for dtype in (np.int64, np.int32):
            given = None if some is None else to_device(some)
            where = to_device(keys.astype(dtype)), to_device(offsets.astype(dtype))
            rows = server.lookup_pooled(*where, "m", 0, weights=given, combiner=combiner)
            assert type(rows) is type(where[0]) and rows.dtype == np.float32
            np.testing.assert_allclose(on_host(rows), expected, rtol=2e-6, atol=1e-3)


def test_offsets_without_the_last_and_a_padding_key(server: Any, to_device: ToDevice) -> None:
    keys, offsets, weights = bags(2)
    kept = keys != 7
    keys[::3] = 7
    kept = keys != 7
    starts = np.concatenate(([0], np.cumsum(kept)))[offsets]
    expected = server.lookup_pooled(keys[kept], starts, "m", 0, weights=weights[kept], combiner="mean")
    for open_end in (False, True):
        given = offsets[:-1] if open_end else offsets
        rows = server.lookup_pooled(
            *(to_device(keys), to_device(given), "m", 0),
            weights=to_device(weights),
            combiner="mean",
            padding=7,
            include_last_offset=not open_end,
        )
        np.testing.assert_allclose(on_host(rows), expected, rtol=2e-6, atol=1e-3)


def test_pooled_rows_are_written_to_out(server: Any, to_device: ToDevice) -> None:
    keys, offsets, _ = bags(3)
    out = to_device(np.zeros((50, DIM), np.float32))
    assert server.lookup_pooled(to_device(keys), to_device(offsets), "m", 0, out=out) is out
    np.testing.assert_allclose(on_host(out), server.lookup_pooled(keys, offsets, "m", 0), rtol=2e-6, atol=1e-3)
    with pytest.raises(ArrayError, match="expected"):
        server.lookup_pooled(to_device(keys), to_device(offsets), "m", 0, out=to_device(np.zeros((3, DIM), np.float32)))


def test_empty_bags_and_no_bags(server: Any, to_device: ToDevice) -> None:
    none = to_device(np.empty(0, np.int64))
    assert on_host(server.lookup_pooled(none, to_device(np.zeros(4, np.int64)), "m", 0)).tolist() == [[0.0] * DIM] * 3
    assert server.lookup_pooled(none, to_device(np.zeros(1, np.int64)), "m", 0).shape == (0, DIM)
    one = server.lookup_pooled(to_device(np.array([3])), to_device(np.array([0, 0, 1])), "m", 0)
    assert on_host(one).tolist() == [[0.0] * DIM, rows_of([3], DIM)[0].tolist()]


def test_invalid_arguments_are_refused(server: Any, to_device: ToDevice) -> None:
    keys, offsets = to_device(np.arange(4)), to_device(np.array([0, 2, 4]))
    with pytest.raises(ConfigError, match=r"combiner: .*'best'"):
        server.lookup_pooled(keys, offsets, "m", 0, combiner="best")
    with pytest.raises(ArrayError, match="weights"):
        server.lookup_pooled(keys, offsets, "m", 0, weights=to_device(np.ones(3, np.float32)))
    with pytest.raises(UnknownModelError):
        server.lookup_pooled(keys, offsets, "other", 0)
    with pytest.raises(ConfigError, match="offsets"):
        server.lookup_pooled(keys, to_device(np.zeros((2, 2), np.int64)), "m", 0)


@pytest.mark.gpu
def test_gpu_offsets_and_weights_must_be_on_the_device_of_the_keys(server: Any) -> None:
    cupy = pytest.importorskip("cupy")
    keys, offsets = cupy.arange(4), np.array([0, 2, 4])
    with pytest.raises(DeviceError, match="offsets: expected integers on cuda:0, as the keys, got integers in host memory"):
        server.lookup_pooled(keys, offsets, "m", 0)
    with pytest.raises(DeviceError, match="weights: expected numbers on cuda:0, as the keys, got numbers in host memory"):
        server.lookup_pooled(keys, cupy.asarray(offsets), "m", 0, weights=np.ones(4, np.float32))


@pytest.mark.gpu
def test_gpu_max_norm_pools_on_the_host(server: Any) -> None:
    cupy = pytest.importorskip("cupy")
    keys, offsets, _ = bags(4)
    rows = server.lookup_pooled(cupy.asarray(keys), cupy.asarray(offsets), "m", 0, max_norm=0.5)
    assert np.array_equal(rows, server.lookup_pooled(keys, offsets, "m", 0, max_norm=0.5))


@pytest.mark.gpu
def test_gpu_torch_keys_of_any_strides_are_pooled(server: Any) -> None:
    torch = pytest.importorskip("torch")
    keys, offsets, weights = bags(5)
    wide = torch.zeros((len(keys), 2), dtype=torch.int64, device="cuda")
    wide[:, 0] = torch.from_numpy(keys)
    doubles = torch.from_numpy(weights).double().cuda()
    rows = server.lookup_pooled(wide[:, 0], torch.from_numpy(offsets).cuda(), "m", 0, weights=doubles)
    expected = server.lookup_pooled(keys, offsets, "m", 0, weights=weights)
    assert rows.is_cuda
    np.testing.assert_allclose(rows.cpu().numpy(), expected, rtol=2e-6, atol=1e-3)
