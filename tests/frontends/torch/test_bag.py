"""``HPSEmbeddingBag`` against ``torch.nn.EmbeddingBag`` and float64 (checklist P11)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, rig_of

from hps_numba import ConfigError, KeyDtypeError
from hps_numba.server.registry import SERVERS

torch = pytest.importorskip("torch")

from hps_numba.frontends import torch as hps  # noqa: E402
from hps_numba.frontends.torch.pooling import pool_rows  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(tmp_path: Path, device: str) -> Iterator[Rig]:
    yield rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0], gpucacheper=0.5)
    SERVERS.close()


def bag_of(served: Rig, **more: Any) -> Any:
    return hps.HPSEmbeddingBag(served.path, "m", 0, DIM, **more)


def theirs(served: Rig, device: str, **more: Any) -> Any:
    return torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(served.rows.copy()).to(device), **more)


def bags(device: str, seed: int = 0, count: int = 12) -> tuple[Any, Any]:
    """``(keys, offsets)``: bags of 0 to 6 keys, some empty, the last too."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 7, (count,), generator=generator)
    sizes[[2, 3, count - 1]] = 0
    keys = torch.randint(0, ROWS, (int(sizes.sum()),), generator=generator)
    return keys.to(device), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]]).to(device)


def close(one: Any, other: Any) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_torch(served: Rig, device: str, mode: str, last: bool) -> None:
    keys, offsets = bags(device)
    if last:
        offsets = torch.cat([offsets, offsets.new_full((1,), len(keys))])
    ours = bag_of(served, mode=mode, include_last_offset=last)(keys, offsets)
    wanted = theirs(served, device, mode=mode, include_last_offset=last)(keys, offsets)
    assert ours.shape == wanted.shape and ours.device == keys.device and close(ours, wanted)
    narrow = bag_of(served, mode=mode, include_last_offset=last)(keys.int(), offsets.int())
    assert torch.equal(ours, narrow)
    square = torch.randint(0, ROWS, (5, 4), device=device)
    assert close(bag_of(served, mode=mode)(square), theirs(served, device, mode=mode)(square))
    assert bag_of(served, mode=mode)(square[:0]).shape == (0, DIM)
    assert not bag_of(served, mode=mode)(square[:, :0]).any()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_key_that_does_not_count(served: Rig, device: str, mode: str) -> None:
    keys = torch.tensor([[1, 7, 2], [7, 7, 7], [3, 4, 5]], device=device)
    ours = bag_of(served, mode=mode, padding_idx=7)(keys)
    assert close(ours, theirs(served, device, mode=mode, padding_idx=7)(keys)) and not ours[1].any()


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_weights_and_their_gradient(served: Rig, device: str, max_norm: float | None) -> None:
    keys, offsets = bags(device, 1)
    toward = torch.randn(len(offsets), DIM, device=device)
    results = []
    for layer in (bag_of(served, mode="sum", max_norm=max_norm), theirs(served, device, mode="sum", max_norm=max_norm)):
        weights = torch.linspace(-1, 2, len(keys), device=device, requires_grad=True)
        answer = layer(keys, offsets, weights)
        answer.backward(toward)
        results.append((answer.detach(), weights.grad))
    assert close(results[0][0], results[1][0]) and close(results[0][1], results[1][1])


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("padding", [None, 9])
def test_weighted_means_by_their_formula(served: Rig, device: str, mode: str, padding: int | None) -> None:
    keys, offsets = bags(device, 2)
    keys[::5] = 9
    values = torch.rand(len(keys), device=device) + 0.5
    ends = torch.cat([offsets[1:], offsets.new_full((1,), len(keys))])

    def formula(weights: Any) -> Any:
        answers = []
        for start, stop in zip(offsets.tolist(), ends.tolist()):
            some = keys[start:stop]
            w = weights[start:stop] * ((some != padding).double() if padding is not None else 1)
            rows = torch.from_numpy(served.rows).to(device)[some].double()
            total = {"sum": w.new_ones(()), "mean": w.sum(), "sqrtn": (w * w).sum().sqrt()}[mode]
            answers.append((w[:, None] * rows).sum(0) / total if float(w.detach().abs().sum()) else rows.new_zeros(DIM))
        return torch.stack(answers)

    toward = torch.randn(len(offsets), DIM, device=device)
    ours, wanted = values.clone().requires_grad_(), values.double().requires_grad_()
    answer = bag_of(served, mode=mode, padding_idx=padding)(keys, offsets, ours)
    answer.backward(toward)
    exact = formula(wanted)
    exact.backward(toward.double())
    assert close(answer.double(), exact) and torch.allclose(ours.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn", "max"])
def test_rows_combined_by_torch_are_the_same(served: Rig, device: str, mode: str) -> None:
    keys, offsets = bags(device, 3)
    starts = torch.cat([offsets, offsets.new_full((1,), len(keys))])
    weights = None if mode == "max" else torch.rand(len(keys), device=device)
    for max_norm, padding in ((None, None), (0.5, None), (None, int(keys[0]))):
        layer = bag_of(served, mode=mode, max_norm=max_norm, padding_idx=padding)
        rows = hps.LookupLayer(served.path, "m", 0, DIM)(keys)
        counted = None if padding is None else keys != padding
        assert close(layer(keys, offsets, weights), pool_rows(rows, starts, weights, mode, max_norm, counted))


def test_the_operator_passes_the_checks_of_torch(served: Rig, device: str) -> None:
    keys, offsets = bags(device, 4)
    starts = torch.cat([offsets, offsets.new_full((1,), len(keys))])
    layer = bag_of(served, mode="mean")
    for weights in (None, torch.rand(len(keys), device=device, requires_grad=True)):
        arguments = (keys, starts, weights, layer.request, DIM, "mean", None, None)
        torch.library.opcheck(torch.ops.hps_numba.pooled.default, arguments)


def test_a_compiled_bag_is_one_graph_with_gradients(served: Rig, device: str) -> None:
    layer, (keys, offsets) = bag_of(served, mode="mean"), bags(device, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (layer, compiled):
        weights = torch.linspace(0.5, 2, len(keys), device=device, requires_grad=True)
        answer = call(keys, offsets, weights)
        answer.sum().backward()
        gradients.append((answer.detach(), weights.grad))
    assert close(gradients[0][0], gradients[1][0]) and close(gradients[0][1], gradients[1][1])


def test_what_does_not_fit(served: Rig, device: str) -> None:
    keys = torch.tensor([1, 2, 3], device=device)
    offsets = torch.tensor([0, 2], device=device)
    for arguments, match in (
        ((keys,), "offsets: expected integers of one dimension"),
        ((keys[None], offsets), "offsets: expected None with input of two dimensions"),
        ((keys[None, None],), "input: .* one or two dimensions"),
        ((keys, offsets, torch.ones(2, device=device)), r"per_sample_weights: expected the shape of input, .*, got .2."),
    ):
        with pytest.raises(ConfigError, match=match):
            bag_of(served)(*arguments)
    with pytest.raises(ConfigError, match="per_sample_weights: expected None with mode 'max'"):
        bag_of(served, mode="max")(keys, offsets, torch.ones(3, device=device))
    with pytest.raises(KeyDtypeError):
        bag_of(served)(keys.float(), offsets)
    with pytest.raises(ConfigError, match="mode: expected one of sum, mean, sqrtn, max, got 'average'"):
        bag_of(served, mode="average")
    with pytest.raises(ConfigError, match="max_norm: expected None or a number from 0 on, got -1"):
        bag_of(served, max_norm=-1)
    if device == "cpu":  # offsets on a GPU are never read back to be checked
        for wrong in ([1, 2], [0, 2, 1], [0, 4]):
            with pytest.raises(ConfigError, match="offsets"):
                bag_of(served)(keys, torch.tensor(wrong))
    assert "mode=sum" in repr(bag_of(served, mode="sum")) and not list(bag_of(served).parameters())


def test_absent_keys_count_with_the_default(served: Rig, device: str) -> None:
    answer = bag_of(served, mode="sum")(torch.tensor([[1, ROWS, -1]], device=device))
    assert np.allclose(answer.cpu()[0], served.rows[1] + 0.5, rtol=1e-5)


# -- every argument of torch.nn.EmbeddingBag ---------------------------------------------------------------------

KEYS = [1, 7, 2, 9, 4]
OFFSETS = ([], [0], [0, 0], [0, 2], [0, 5], [0, 2, 2, 4], [0, 2, 4, 4], [1, 3], [0, 6], [0, 3, 2], [-1, 2], [0, 9, 9])


def answer_of(call: Any) -> Any:
    """The rows, or None for an error of any class that a caller's mistake may have."""
    try:
        return call().detach().cpu()
    except (RuntimeError, ValueError, TypeError):
        return None


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_offsets_as_those_of_torch(served: Rig, device: str, mode: str, offsets: list[int], last: bool, narrow: bool) -> None:
    """Torch divides a mean by the keys of the tail too, and its max reads beyond memory: it gets keys without the tail, and
    is not asked about offsets that are out of order."""
    ordered = offsets[:1] == [0] and offsets == sorted(offsets) and offsets[-1] <= len(KEYS)
    if device == "cuda" and not (ordered or offsets == []):
        pytest.skip("offsets on a GPU are not read back to be checked")
    end = offsets[-1] if last and ordered else len(KEYS)
    dtype = torch.int32 if narrow else torch.int64
    given, starts = torch.tensor(KEYS, dtype=dtype, device=device), torch.tensor(offsets, dtype=dtype, device=device)
    wanted = torch.empty(0, DIM) if offsets == [] and not last else None
    if ordered:
        wanted = theirs(served, device, mode=mode, include_last_offset=last)(given[:end], starts).cpu()
    got = answer_of(lambda: bag_of(served, mode=mode, include_last_offset=last)(given, starts))
    assert (got is None) == (wanted is None)
    if wanted is not None:
        assert got.shape == wanted.shape and close(got, wanted)


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn", "max"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("tail", [0, 3])
def test_padded_tail_changes_nothing(
    served: Rig, device: str, mode: str, max_norm: float | None, padding_idx: int | None, tail: int
) -> None:
    """Keys padded to a fixed length after the last bag: rows, gradients of weights and gradients of rows are as without."""
    keys, offsets = bags(device)
    offsets = torch.cat([offsets, offsets.new_full((1,), len(keys))])
    keys[::3] = 7
    options = {"mode": mode, "max_norm": max_norm, "padding_idx": padding_idx, "include_last_offset": True}
    layer, trained = bag_of(served, **options), bag_of(served, trainable=True, **options)
    toward = torch.randn(len(offsets) - 1, DIM, device=device)
    results = []
    for more in (0, tail):
        padded = torch.cat([keys, keys.new_full((more,), ROWS + 5)])  # no such row: the default would show
        weights = None
        if mode != "max":
            weights = torch.linspace(0.5, 2, len(padded), device=device)
            weights[: len(keys)] = torch.linspace(0.5, 2, len(keys), device=device)
            weights.requires_grad_()
        answer = layer(padded, offsets, weights)
        if weights is not None:
            answer.backward(toward)
        trained.rows.grad = None
        trained(padded, offsets, None if weights is None else weights.detach()).backward(toward)
        gradient = None if weights is None else weights.grad[: len(keys)].cpu()
        of_tail = None if weights is None else weights.grad[len(keys) :]
        assert of_tail is None or not of_tail.any()
        results.append((answer.detach().cpu(), gradient, trained.rows.touched.cpu(), trained.rows.grad.cpu()))
    for without, padded in zip(*results):
        assert without is None or torch.equal(without, padded) or close(without, padded)


def test_tail_of_rows_combined_by_torch(served: Rig, device: str) -> None:
    rows = torch.randn(6, DIM, device=device)
    offsets = torch.tensor([0, 2, 4], device=device)
    for mode in ("sum", "mean", "sqrtn", "max"):
        assert close(pool_rows(rows, offsets, None, mode), pool_rows(rows[:4], offsets, None, mode))


@pytest.mark.parametrize("per_sample_weights", [None, "float32", "float64", "float16"])
def test_types_of_weights(served: Rig, device: str, per_sample_weights: str | None) -> None:
    keys, offsets = bags(device)
    weights = None
    if per_sample_weights is not None:
        weights = torch.linspace(0.5, 2, len(keys), device=device).to(getattr(torch, per_sample_weights))
    wanted = theirs(served, device, mode="sum")(keys, offsets, None if weights is None else weights.float())
    assert close(bag_of(served, mode="sum")(keys, offsets=offsets, per_sample_weights=weights), wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_scripted_bag_serves(served: Rig, device: str, tmp_path: Path, mode: str, last: bool) -> None:
    layer = bag_of(served, mode=mode, include_last_offset=last, padding_idx=9, max_norm=2.0)
    keys, offsets = bags(device)
    if last:
        offsets = torch.cat([offsets, offsets.new_full((1,), len(keys))])
    torch.jit.save(torch.jit.script(layer), str(tmp_path / "bag.pt"))
    program = torch.jit.load(str(tmp_path / "bag.pt"))
    equal = torch.equal if device == "cpu" else close  # clipped rows are added by Torch, in any order on a GPU
    assert equal(program(keys, offsets), layer(keys, offsets))
    if not last:
        assert equal(program(keys[:6].reshape(2, 3)), layer(keys[:6].reshape(2, 3)))
    if mode != "max":
        weights = torch.linspace(0.5, 2, len(keys), device=device)
        assert equal(program(keys, offsets, weights), layer(keys, offsets, weights))
