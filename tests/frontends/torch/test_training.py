"""Trained rows against ``torch.nn.Embedding`` and Torch's optimizers; the row-wise Adagrad against its formula."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import ROWS, Rig, rig_of
from support.training import sum_in_blocks
from support.waiting import join_all

from hps_numba import ArrayError, ClosedError, ConfigError, KeyDtypeError
from hps_numba.server.registry import SERVERS
from hps_numba.training.initializers import Normal, Uniform

torch = pytest.importorskip("torch")

from hps_numba.frontends import torch as hps  # noqa: E402
from hps_numba.frontends.torch.row_gradients import _sums_in_order  # noqa: E402

DIM = 17  # as in test_cache.py, so that kernels are compiled once for both
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_GPU])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(place: str) -> str:
    return place.split(",")[0]


def wide_rig(folder: Path, **entry: Any) -> Rig:
    """A rig whose first table has rows of DIM elements."""
    made = rig_of(folder, embedding_vecsize_per_table=[DIM, 3], **entry)
    made.rows = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    made.rows.tofile(folder / "t0" / "emb_vector")
    return made


@pytest.fixture
def rig(tmp_path: Path, place: str) -> Iterator[Rig]:
    made = wide_rig(tmp_path, deployed_device_list=[0] if place == "cuda" else [], gpucacheper=0.1)
    made.config["cache_on_cpu"] = place == "cpu, cached"
    made.write()
    yield made
    SERVERS.close()


def layer_of(rig: Rig, **more: Any) -> Any:
    return hps.LookupLayer(rig.path, "m", 0, DIM, **{"trainable": True, **more})


def embedding_of(rig: Rig, device: str) -> Any:
    return torch.nn.Embedding.from_pretrained(torch.from_numpy(rig.rows.copy()), freeze=False, sparse=True).to(device)


def batches(device: str, count: int, seed: int = 0, high: int = ROWS) -> Iterator[tuple[Any, Any]]:
    """Keys with duplicates, and what the rows are to become."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        keys = (torch.rand(6, 5, generator=generator).square() * high).long()
        yield keys.to(device), torch.randn(6, 5, DIM, generator=generator).to(device)


def all_rows(layer: Any, device: str) -> Any:
    """Every row as a call of the layer sees it."""
    with torch.no_grad():
        return layer(torch.arange(ROWS, device=device)).cpu()


def loss_of(rows: Any, target: Any) -> Any:
    return (rows - target).square().sum()


def rowwise_adagrad(embedding: Any, lr: float) -> Callable[[], None]:
    """The formula, row by row in float64."""
    sums = [0.0] * ROWS

    def step() -> None:
        with torch.no_grad():
            gradients = embedding.weight.grad.coalesce()
            for row, gradient in zip(gradients.indices()[0].tolist(), gradients.values().double()):
                sums[row] += float(gradient.square().mean())
                moved = embedding.weight[row].double() - lr * gradient / (math.sqrt(sums[row]) + 1e-10)
                embedding.weight[row] = moved.float()

    return step


STEPS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Callable[[], Any]]]] = {
    "SGD": (lambda ours: hps.SGD(ours, lr=0.01), lambda theirs: torch.optim.SGD(theirs.parameters(), lr=0.01).step),
    "Adagrad": (lambda ours: hps.Adagrad(ours, lr=0.05), lambda theirs: rowwise_adagrad(theirs, 0.05)),
    "Adam": (lambda ours: hps.Adam(ours, lr=0.02), lambda theirs: torch.optim.SparseAdam(theirs.parameters(), lr=0.02).step),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("place", ["cpu", "cpu, cached", ON_GPU], indirect=True)
def test_50_steps_as_an_embedding_of_torch(rig: Rig, place: str, device: str, kind: str) -> None:
    """Duplicates in a batch, two backwards a step, and a cache that holds a tenth of the rows."""
    ours, theirs = layer_of(rig), embedding_of(rig, device)
    optimizer, step = STEPS[kind][0](ours), STEPS[kind][1](theirs)
    some = batches(device, 100)
    for _ in range(50):
        optimizer.zero_grad()
        theirs.zero_grad()
        for keys, target in (next(some), next(some)):
            rows = ours(keys)
            torch.testing.assert_close(rows, theirs(keys), rtol=1e-4, atol=1e-5)
            loss_of(rows, target).backward()
            loss_of(theirs(keys), target).backward()
        optimizer.step()
        step()
    torch.testing.assert_close(all_rows(ours, device), theirs.weight.detach().cpu(), rtol=1e-4, atol=1e-5)
    stats = SERVERS.open(rig.path).stats()["m"]["t0"]
    assert place == "cpu" or (stats.caches[0].capacity < ROWS and stats.caches[0].evictions > 0)
    assert not np.allclose(all_rows(ours, device), rig.rows)


def test_gradients_are_those_of_an_embedding(rig: Rig, device: str) -> None:
    ours, theirs = layer_of(rig), embedding_of(rig, device)
    assert ours.rows.grad is None and not len(ours.rows.touched)
    for keys, target in batches(device, 20):
        loss_of(ours(keys), target).backward()
        loss_of(theirs(keys), target).backward()
    gradient = theirs.weight.grad.coalesce()
    assert torch.equal(ours.rows.touched, gradient.indices()[0])
    torch.testing.assert_close(ours.rows.grad, gradient.values(), rtol=1e-5, atol=1e-5)
    assert ours.rows.grad.device.type == device
    again = layer_of(rig)
    assert again.rows is ours.rows and copy.deepcopy(ours).rows is ours.rows  # one table, whoever asks
    hps.SGD(ours).zero_grad()
    assert ours.rows.grad is None


def test_gradients_that_nobody_applies_are_told_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    first, second = layer_of(rig), hps.LookupLayer(rig.path, "m", 1, 3, trainable=True)
    hps.SGD(second)
    for layer in (first, second, first):
        layer(torch.tensor([1])).sum().backward()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in warnings if "got gradients" in text] == [
        "<Rows of m, t0 [17]>: got gradients, but no optimizer of hps_numba has these rows: they do not move"
    ]


def test_sums_in_order_add_the_rows_of_a_group_in_blocks() -> None:
    starts = [0, 1, 40, 168, 233, 4900, 4999, 5000]
    rows = torch.randn(5000, 3)
    wanted = [sum_in_blocks(rows.numpy()[start:stop]) for start, stop in itertools.pairwise(starts)]
    assert np.array_equal(_sums_in_order(rows, torch.tensor(starts[:-1])).numpy(), wanted)


def test_a_layer_trains_unless_torch_exports(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(rig)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # as compilers before Torch 2.13 take it
    assert layer(torch.tensor([1, 2])).requires_grad
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert not layer(torch.tensor([1, 2])).requires_grad


def test_sums_are_the_same_every_time(rig: Rig, device: str) -> None:
    layer = layer_of(rig)
    keys = torch.randint(0, 20, (4000,), device=device)
    toward = torch.randn(4000, DIM, device=device)
    seen = []
    for _ in range(3):
        layer.rows.grad = None
        layer(keys).backward(toward)
        seen.append(layer.rows.grad)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("kind", [torch.int32, torch.uint32, torch.uint64])
def test_keys_of_any_type(rig: Rig, device: str, kind: Any) -> None:
    layer = layer_of(rig)
    layer(torch.tensor([[5, 199, 5]], device=device).to(kind)).sum().backward()
    assert layer.rows.touched.tolist() == [5, 199] and layer.rows.grad[:, 0].tolist() == [2, 1]
    if kind == torch.uint64:
        layer(torch.tensor([-3], device=device).view(torch.uint64)).sum().backward()
        hps.SGD(layer, lr=1.0).step()
        assert layer.rows.touched.tolist() == [-3, 5, 199]
        assert np.allclose(SERVERS.open(rig.path).lookup([-3], "m", 0), 0.25 - 1)


def test_32_bit_keys(tmp_path: Path) -> None:
    rig = wide_rig(tmp_path)
    rig.config["supportlonglong"] = False
    for name in ("t0", "t1"):
        np.arange(2**32 - ROWS, 2**32, dtype=np.int64).tofile(tmp_path / name / "key")
    rig.write()
    layer = layer_of(rig)
    keys = torch.tensor([-1, -2, -1], dtype=torch.int32)
    layer(keys).sum().backward()
    hps.SGD(layer, lr=1.0).step()
    assert layer.rows.touched.tolist() == [2**32 - 2, 2**32 - 1]
    assert np.allclose(layer(keys).detach(), rig.rows[[-1, -2, -1]] - [[2], [1], [2]], atol=1e-6)
    SERVERS.close()


# -- what looks for gradients ---------------------------------------------------------------------


def test_a_scaler_unscales_and_skips(rig: Rig, device: str) -> None:
    layer, theirs = layer_of(rig), embedding_of(rig, device)
    optimizer, scaler = hps.SGD(layer, lr=0.1), torch.amp.GradScaler(device, init_scale=1024.0)
    keys, target = next(batches(device, 1))
    with torch.autocast(device, torch.bfloat16):
        loss = loss_of(layer(keys), target)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    loss_of(theirs(keys), target).backward()
    torch.testing.assert_close(layer.rows.grad, theirs.weight.grad.coalesce().values(), rtol=1e-5, atol=1e-4)
    scaler.step(optimizer)
    scaler.update()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    torch.testing.assert_close(all_rows(layer, device), theirs.weight.detach().cpu(), rtol=1e-4, atol=1e-4)
    before = all_rows(layer, device)
    optimizer.zero_grad()
    scaler.scale(layer(keys).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0 and torch.equal(all_rows(layer, device), before)


def test_clipping_is_by_the_norm_of_rows_and_head(rig: Rig, device: str) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(DIM, 1).to(device)
    other = copy.deepcopy(head)
    layer, theirs = layer_of(rig), torch.nn.Embedding.from_pretrained(torch.from_numpy(rig.rows), freeze=False).to(device)
    keys = torch.tensor([3, 4, 3, 9], device=device)
    head(layer(keys)).square().sum().backward()
    other(theirs(keys)).square().sum().backward()
    model = torch.nn.Sequential(layer, head)
    ours = torch.nn.utils.clip_grad_norm_([*model.parameters(), *hps.trained_rows(model)], 0.5)
    wanted = torch.nn.utils.clip_grad_norm_([*theirs.parameters(), *other.parameters()], 0.5)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(layer.rows.grad, theirs.weight.grad[[3, 4, 9]])
    layer.rows.grad = layer.rows.grad * 2
    torch.nn.utils.clip_grad_value_([layer.rows], 1e-3)
    assert float(layer.rows.grad.abs().max()) <= 1.01e-3
    with pytest.raises(ArrayError, match=r"grad of rows: expected \[3, 17\], .*, got \[1, 17\]"):
        layer.rows.grad = torch.ones(1, DIM)


def test_rates_follow_a_scheduler_and_groups(rig: Rig, device: str) -> None:
    first, second = layer_of(rig), hps.LookupLayer(rig.path, "m", "t1", 3, trainable=True)
    optimizer = hps.SGD([{"params": first, "lr": 1.0}, {"params": [second.rows]}], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    keys = torch.tensor([7], device=device)
    moved = []
    for _ in range(2):
        before = first(keys).detach(), second(keys).detach()
        optimizer.zero_grad()
        (first(keys).sum() + second(keys).sum()).backward()
        assert optimizer.step(lambda: 3.5) == 3.5
        schedule.step()
        moved += [float((was - layer(keys).detach()).mean()) for was, layer in zip(before, (first, second))]
    assert np.allclose(moved, [1.0, 0.5, 0.1, 0.05], atol=1e-5)
    with pytest.raises(ConfigError, match=r"lr: expected a number of at least 0, got -1\.0"):
        optimizer.add_param_group({"params": first.rows, "lr": -1.0})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": first})


def test_an_optimizer_continues_from_its_state(rig: Rig, device: str) -> None:
    layer = layer_of(rig)
    server = SERVERS.open(rig.path)

    def train(optimizer: Any, seed: int) -> Any:
        for keys, target in batches(device, 5, seed):
            optimizer.zero_grad()
            loss_of(layer(keys), target).backward()
            optimizer.step()
        return all_rows(layer, device)

    first = hps.Adam(layer, lr=0.1)
    rows = train(first, 1)
    kept = pickle.loads(pickle.dumps(first.state_dict()))
    assert sorted(kept["state"][0]) == ["keys", "steps", "values"] and kept["state"][0]["steps"] == 5
    wanted = train(first, 2)
    server.update(np.arange(ROWS), rows.numpy(), "m", 0)
    second = hps.Adam(layer, lr=0.7)
    second.load_state_dict(kept)
    assert second.param_groups[0]["lr"] == 0.1 and torch.equal(train(second, 2), wanted)
    with pytest.raises(ConfigError, match="expected state of shape"):
        hps.Adagrad(layer).load_state_dict(kept)
    with pytest.raises(ConfigError, match="state: expected 2 tables, got 1"):
        hps.Adam([layer, hps.LookupLayer(rig.path, "m", 1, 3, trainable=True)]).load_state_dict(kept)


# -- rows that do not exist yet ---------------------------------------------------------------------


@pytest.mark.parametrize("initializer", ["normal", Uniform(0.5, seed=3), lambda keys, dim: np.repeat(keys[:, None], dim, 1)])
def test_new_rows(rig: Rig, device: str, initializer: Any) -> None:
    layer = layer_of(rig, initializer=initializer)
    keys = torch.tensor([[ROWS + 1, 3], [-9, ROWS + 1]], device=device)
    with torch.no_grad():
        assert (layer(keys)[1] == 0.25).all()  # no gradient, no row
    rows = layer(keys)
    assert torch.equal(rows[0, 0], rows[1, 1]) and not torch.equal(rows[0, 0], rows[1, 0])
    assert np.allclose(rows[0, 1].detach().cpu(), rig.rows[3]) and not (rows[1] == 0.25).any()
    server = SERVERS.open(rig.path)
    assert np.array_equal(server.lookup([ROWS + 1, -9], "m", 0), rows[:, 0].detach().cpu()[[0, 1]])
    optimizer = hps.SGD(layer, lr=1.0)
    rows.sum().backward()
    server.erase([-9], "m", 0)  # gone before its gradient: it starts again from its initial value
    optimizer.step()
    after = torch.from_numpy(server.lookup([ROWS + 1, -9], "m", 0))
    torch.testing.assert_close(after, rows[:, 0].detach().cpu() - torch.tensor([[2.0], [1.0]]), rtol=1e-5, atol=1e-4)


def test_without_an_initializer_a_row_begins_with_the_default(rig: Rig, device: str) -> None:
    layer = layer_of(rig)
    keys = torch.tensor([ROWS, ROWS], device=device)
    rows = layer(keys)
    assert (rows == 0.25).all() and not SERVERS.open(rig.path).contains([ROWS], "m", 0).any()
    rows.sum().backward()
    hps.SGD(layer, lr=0.1).step()
    torch.testing.assert_close(layer(keys), torch.full((2, DIM), 0.05, device=device))


KINDS: dict[str, Callable[..., Any]] = {
    "LookupLayer": lambda rig, **more: hps.LookupLayer(rig.path, "m", 0, DIM, **more),
    "HPSEmbeddingBag": lambda rig, **more: hps.HPSEmbeddingBag(rig.path, "m", 0, DIM, **more),
    "LookupCollection": lambda rig, **more: hps.LookupCollection(rig.path, "m", {"a": (0, DIM), "b": (0, DIM)}, **more),
}


def rows_of_layer(layer: Any, keys: Any) -> Any:
    """What a layer of any kind answers, as one tensor with a gradient."""
    if isinstance(layer, hps.LookupCollection):
        answer = layer({"a": keys, "b": keys})
        return answer["a"] + answer["b"] + layer(torch.stack([keys, keys]))[0]
    return layer(keys)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_created_after_eval(rig: Rig, device: str, kind: str) -> None:
    layer = KINDS[kind](rig, trainable=True, initializer="normal")
    server, keys = SERVERS.open(rig.path), torch.tensor([[ROWS + 1, 3]], device=device)
    torch.nn.Sequential(layer).eval()
    assert rows_of_layer(layer, keys).requires_grad  # gradients are enabled, and yet:
    assert not server.contains([ROWS + 1], "m", 0).any()
    layer.train()
    rows_of_layer(layer, keys)
    assert server.contains([ROWS + 1], "m", 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_read_only_layers_neither_create_nor_train_rows(rig: Rig, device: str, kind: str) -> None:
    layer = KINDS[kind](rig, trainable=True, initializer="normal", read_only=True)
    server, keys = SERVERS.open(rig.path), torch.tensor([[ROWS + 1, 3]], device=device)
    assert not rows_of_layer(layer, keys).requires_grad and "read_only=True" in repr(layer)
    assert not server.contains([ROWS + 1], "m", 0).any() and not list(hps.trained_rows(layer))
    with pytest.raises(ConfigError, match=r"got no trained rows"):
        hps.SGD(layer)
    layer.read_only = False
    rows_of_layer(layer, keys).sum().backward()
    assert server.contains([ROWS + 1], "m", 0).all() and list(hps.trained_rows(layer))


def test_row_count_is_the_same_after_any_inference(rig: Rig, device: str) -> None:
    layers = [make(rig, trainable=True, initializer="normal").eval() for make in KINDS.values()]
    server = SERVERS.open(rig.path)
    before = [table.rows for table in server.stats()["m"].values()]
    keys = torch.arange(ROWS, 4 * ROWS, device=device).reshape(-1, 3)
    for layer in layers:
        rows_of_layer(layer, keys)
        with torch.no_grad():
            rows_of_layer(layer, keys)
    assert not server.contains(range(ROWS, 4 * ROWS), "m", 0).any()
    assert [table.rows for table in server.stats()["m"].values()] == before


@pytest.mark.parametrize("initializer", [None, "normal"])
def test_row_of_the_padding_key_does_not_train(rig: Rig, device: str, initializer: str | None) -> None:
    layer = layer_of(rig, padding_idx=ROWS + 7, initializer=initializer)
    keys = torch.tensor([[3, ROWS + 7], [ROWS + 7, 4]], device=device)
    layer(keys).sum().backward()
    assert layer.rows.touched.tolist() == [3, 4]
    hps.SGD(layer, lr=0.1).step()
    assert not SERVERS.open(rig.path).contains([ROWS + 7], "m", 0).any()


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradient_of_clipped_rows_is_that_of_their_formula(rig: Rig, device: str, max_norm: float) -> None:
    keys = torch.tensor([[3, 5], [5, 8]], device=device)
    toward = torch.randn(2, 2, DIM, device=device)
    layer = layer_of(rig, max_norm=max_norm)
    layer(keys).backward(toward)
    weight = torch.from_numpy(rig.rows.copy()).to(device).double().requires_grad_()
    rows = weight[keys]
    (rows * (max_norm / rows.norm(dim=-1, keepdim=True).clamp_min(max_norm))).backward(toward.double())
    torch.testing.assert_close(layer.rows.grad.double(), weight.grad[layer.rows.touched], rtol=1e-4, atol=1e-5)


def test_layers_of_one_table_agree_on_new_rows(rig: Rig) -> None:
    first, second = layer_of(rig, initializer=Normal(0.1)), layer_of(rig, initializer=Normal(0.2))
    assert first.rows.initializer == Normal(0.1)
    with pytest.raises(ConfigError, match=r"expected Normal\(std=0.1.*, as another layer of .*, got Normal\(std=0.2, seed=0\)"):
        second.tables  # noqa: B018
    with pytest.raises(ConfigError, match="initializer: expected one of zeros, normal, uniform, a function"):
        layer_of(rig, initializer="ones")
    with pytest.raises(ConfigError, match="initializer: expected trainable=True with it"):
        layer_of(rig, trainable=False, initializer="zeros")


# -- bags and collections ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 7])
def test_bags_as_those_of_torch(rig: Rig, device: str, mode: str, padding: int | None) -> None:
    ours = hps.HPSEmbeddingBag(rig.path, "m", 0, DIM, mode=mode, padding_idx=padding, trainable=True)
    weight = torch.from_numpy(rig.rows.copy())
    theirs = torch.nn.EmbeddingBag.from_pretrained(weight, mode=mode, padding_idx=padding, freeze=False).to(device)
    optimizer, other = hps.SGD(ours, lr=0.05), torch.optim.SGD(theirs.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        keys = torch.randint(0, 30, (40,), generator=generator).to(device)
        offsets = torch.tensor([0, 9, 9, 20, 38], device=device)
        weights = [None, None]
        if mode == "sum":
            weights = [torch.linspace(-1, 2, 40, device=device, requires_grad=True) for _ in range(2)]
        toward = torch.randn(5, DIM, generator=generator).to(device)
        for layer, step, some in ((ours, optimizer, weights[0]), (theirs, other, weights[1])):
            step.zero_grad()
            layer(keys, offsets, some).backward(toward)
            step.step()
        if mode == "sum":
            torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-4, atol=1e-4)
    after = hps.LookupLayer(rig.path, "m", 0, DIM)
    torch.testing.assert_close(all_rows(after, device), theirs.weight.detach().cpu(), rtol=1e-4, atol=1e-4)
    assert padding is None or padding not in ours.rows.touched.tolist()


@pytest.mark.parametrize(("mode", "max_norm"), [("mean", 1.5), ("sqrtn", None), ("sqrtn", 2.0), ("max", 2.0)])
def test_gradients_of_bags_by_their_formula(rig: Rig, device: str, mode: str, max_norm: float | None) -> None:
    layer = hps.HPSEmbeddingBag(rig.path, "m", 0, DIM, mode=mode, max_norm=max_norm, trainable=True)
    keys = torch.tensor([[3, 4, 5], [5, 9, 3]], device=device)
    weights = None if mode == "max" else torch.tensor([[1.0, 2.0, 0.5], [0.3, 1.0, -0.5]], device=device)
    toward = torch.randn(2, DIM, device=device)
    layer(keys, per_sample_weights=weights).backward(toward)
    rows = torch.from_numpy(rig.rows).to(device).double().requires_grad_()
    some = rows[keys]
    if max_norm is not None:
        some = some * (max_norm / some.norm(dim=-1, keepdim=True).clamp_min(max_norm))
    if weights is None:
        exact = some.max(1).values
    else:
        w = weights.double()
        exact = (some * w[..., None]).sum(1) / (w.sum(1) if mode == "mean" else w.square().sum(1).sqrt())[:, None]
    exact.backward(toward.double())
    touched = layer.rows.touched
    assert touched.tolist() == [3, 4, 5, 9]
    torch.testing.assert_close(layer.rows.grad.double(), rows.grad[touched], rtol=1e-4, atol=1e-5)


def test_collections_train_every_table(rig: Rig, device: str) -> None:
    tables = {"a": (0, DIM), "b": ("t1", 3), "same as a": ("t0", DIM)}
    layer = hps.LookupCollection(rig.path, "m", tables, trainable=True, initializer="zeros")
    assert len(list(hps.trained_rows(layer))) == 2
    keys = torch.tensor([5, 5, 1000], device=device)
    rows = layer({"a": keys, "same as a": keys[:1], "b": keys})
    sum(some.sum() for some in rows.values()).backward()
    hps.SGD(layer, lr=1.0).step()
    after = layer({"a": keys, "b": keys})
    assert np.allclose(after["a"].detach().cpu(), [rig.rows[5] - 3, rig.rows[5] - 3, [-1] * DIM], atol=1e-5)
    assert np.allclose(after["b"].detach().cpu(), [rig.narrow[5] - 2, rig.narrow[5] - 2, [-1] * 3], atol=1e-5)
    alike = hps.LookupCollection(rig.path, "m", {"a": (0, DIM), "c": (0, DIM)}, trainable=True)
    alike.tables[0].grad = None
    alike(torch.stack([keys, keys])).sum().backward()  # one tensor for all features
    assert layer.tables[0].grad[:, 0].tolist() == [4, 2]
    rows = layer({"a": keys, "b": keys})
    before = layer.tables[0].grad.clone()
    rows["b"].sum().backward()  # the other table has no part in it
    assert torch.equal(layer.tables[0].grad, before) and layer.tables[1].grad[0].tolist() == [4] * 3


# -- compilers, threads, copies ---------------------------------------------------------------------


NEEDS_CXX = pytest.mark.skipif(shutil.which("c++") is None, reason="this backend needs a C++ compiler")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=NEEDS_CXX)])
def test_compiled_models_train_alike(rig: Rig, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own
    layer = layer_of(rig, initializer="normal")
    bag = hps.HPSEmbeddingBag(rig.path, "m", 1, 3, mode="sum", trainable=True, padding_idx=2)

    def model(keys: Any) -> Any:
        twice = layer(keys) + layer(keys)  # of which a compiler may make one
        return twice.sum() + layer(keys).square().sum() + bag(keys, None, torch.ones_like(keys).float()).sum()

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    keys = torch.tensor([[1, 2, 2], [700, 3, 1]], device=device)
    gradients = []
    for call in (model, compiled):
        layer.rows.grad = bag.rows.grad = None
        for _ in range(2):
            loss = call(keys)
            loss.backward()
        gradients.append((loss.detach(), layer.rows.touched, layer.rows.grad, bag.rows.touched, bag.rows.grad))
    assert gradients[0][1].tolist() == [1, 2, 3, 700] and gradients[0][3].tolist() == [1, 3, 700]
    for ours, wanted in zip(*gradients):
        torch.testing.assert_close(ours, wanted)


def test_the_operators_pass_the_checks_of_torch(rig: Rig, device: str) -> None:
    layer, ops = layer_of(rig), torch.ops.hps_numba
    keys, request = torch.tensor([[1, 2]], device=device), layer.request
    torch.library.opcheck(ops.lookup_trained.default, (keys, layer._switch, request, DIM))
    torch.library.opcheck(ops.lookup_many_trained.default, ([keys, keys], layer._switch, _twice(rig), [DIM, 3]))
    starts = torch.tensor([0, 1, 2], device=device)
    settings = (keys[0], starts, None, request, DIM, "mean", None, None, layer._switch)
    torch.library.opcheck(ops.pooled_trained.default, settings)
    layer.rows.grad = None


def _twice(rig: Rig) -> str:
    return str(hps.LookupCollection(rig.path, "m", {"a": (0, DIM), "b": (1, 3)}).request_of(["a", "b"]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_exported_and_scripted_layers_serve(rig: Rig, device: str) -> None:
    layer = layer_of(rig, initializer="zeros")
    keys = torch.tensor([1, 1000], device=device)
    for program in (torch.export.export(layer, (keys,)).module(), torch.jit.script(layer)):
        assert (program(keys)[1] == 0.25).all() and not program(keys).requires_grad


def test_backwards_from_16_threads(rig: Rig, device: str) -> None:
    layer, start = layer_of(rig), threading.Barrier(16)

    def work(seed: int) -> None:
        start.wait()
        for keys, _ in batches(device, 10, seed):
            layer(keys).sum().backward()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    counts = np.zeros(ROWS)
    for seed in range(16):
        for keys, _ in batches("cpu", 10, seed):
            np.add.at(counts, keys.numpy().ravel(), 1)
    assert np.array_equal(layer.rows.touched.cpu(), np.flatnonzero(counts))
    assert np.array_equal(layer.rows.grad[:, 0].cpu(), counts[counts > 0])


def test_layers_are_frozen_unless_trainable(rig: Rig, device: str) -> None:
    frozen, layer = layer_of(rig, trainable=False), layer_of(rig)
    keys = torch.tensor([1, 2], device=device)
    assert not frozen(keys).requires_grad and layer(keys).requires_grad
    assert not list(layer.parameters()) and list(layer.state_dict()) == ["_extra_state"]
    with torch.no_grad():
        assert not layer(keys).requires_grad
    layer.trainable = False
    assert not layer(keys).requires_grad and not list(hps.trained_rows(layer))
    assert "trainable" not in repr(frozen)
    again = pickle.loads(pickle.dumps(layer_of(rig, initializer=Normal(0.5))))
    assert repr(again) == (
        "LookupLayer(m, 0, 17, output_dtype=torch.float32, trainable=True, initializer=Normal(std=0.5, seed=0))"
    )
    assert again(keys).requires_grad and again.to(device).half().rows is layer.rows


def test_calls_that_are_made_again_in_the_backward(rig: Rig, device: str) -> None:
    layer, head = layer_of(rig, initializer="normal"), torch.nn.Linear(DIM, 3).to(device)
    keys = torch.tensor([1, 1, 500], device=device)
    gradients = []
    for call in (
        lambda: head(layer(keys)),
        lambda: torch.utils.checkpoint.checkpoint(lambda: head(layer(keys)), use_reentrant=False),
    ):
        layer.rows.grad = None
        call().square().sum().backward()
        gradients.append(layer.rows.grad)
    assert torch.equal(*gradients) and layer.rows.touched.tolist() == [1, 500]
    loss = layer(keys).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(layer.rows.grad - gradients[0], torch.tensor([[4.0], [2.0]], device=device).expand(2, DIM))
    before = layer.rows.grad.clone()
    torch.autograd.grad(head(layer(keys)).sum(), head.weight)  # a gradient of something else
    assert torch.equal(layer.rows.grad, before)
    layer(keys[:0]).sum().backward()
    assert layer.rows.touched.tolist() == [1, 500]


def test_other_optimizers_refuse_rows(rig: Rig) -> None:
    layer = layer_of(rig)
    for keys in ([1], [1, 2]):
        layer(torch.tensor(keys)).sum().backward()
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad):
            with pytest.raises(RuntimeError):
                kind([layer.rows], lr=0.1).step()


def test_what_does_not_fit(rig: Rig) -> None:
    layer = layer_of(rig)
    for wrong in (layer_of(rig, trainable=False), torch.nn.Linear(1, 1), []):
        with pytest.raises(ConfigError, match=r"params: expected .*, got no trained rows"):
            hps.SGD(wrong)
    with pytest.raises(ConfigError, match="params: expected modules or their trained rows, got Parameter"):
        hps.SGD(torch.nn.Linear(1, 1).parameters())
    with pytest.raises(ConfigError, match="betas"):
        hps.Adam(layer, betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="reduction: expected 'mean', 'sum' or None, got 'max'"):
        hps.SGD(layer, reduction="max")
    with pytest.raises(KeyDtypeError):
        layer(torch.tensor([1.0]))
    with pytest.raises(ConfigError, match="belongs to the server of its process"):
        pickle.dumps(layer.rows)
    optimizer, rows = hps.SGD(layer), layer.rows
    layer(torch.tensor([1])).sum().backward()
    SERVERS.close()
    with pytest.raises(ClosedError):
        optimizer.step()
    with pytest.raises(ClosedError, match="rows of m, t0: their server is closed"):
        rows.server  # noqa: B018
    assert repr(rows) == "<Rows of m, t0 [17]>" and layer(torch.tensor([1])).requires_grad  # by a new server


# -- state_dict ---------------------------------------------------------------------


def test_a_state_dict_tells_the_tables_and_has_rows_by_choice(rig: Rig, device: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(layer_of(rig, trainable=False), torch.nn.Linear(DIM, 1)).to(device)
    collection = hps.LookupCollection(rig.path, "m", {"a": (0, DIM), "b": ("t1", 3)})
    bag = hps.HPSEmbeddingBag(rig.path, "m", 0, DIM)
    assert not SERVERS.opened  # no row was asked for
    torch.save(model.state_dict(), tmp_path / "model.pt")
    kept = torch.load(tmp_path / "model.pt", weights_only=True)
    assert kept["0._extra_state"] == {"version": 1, "config": rig.path, "tables": [["m", 0, DIM]]}
    model.load_state_dict(kept)
    del kept["0._extra_state"]
    model.load_state_dict(kept)
    bag.load_state_dict(model[0].state_dict())
    with pytest.raises(ConfigError, match=r"expected tables \[\['m', 0, 17\], \['m', 't1', 3\]\], got \[\['m', 0, 17\]\]"):
        collection.load_state_dict(model[0].state_dict())
    with pytest.raises(ConfigError, match="state_dict: expected version 1, got 7"):
        bag.load_state_dict({"_extra_state": {"version": 7}})
    collection.rows_in_state_dict = True
    torch.save(collection.state_dict(), tmp_path / "rows.pt")
    server, keys = SERVERS.open(rig.path), torch.arange(ROWS + 5, device=device)
    before = collection({"a": keys, "b": keys})
    server.update(np.arange(ROWS), np.zeros((ROWS, DIM)), "m", 0)
    server.insert(np.arange(ROWS, ROWS + 5), np.zeros((5, 3)), "m", 1)
    collection.load_state_dict(torch.load(tmp_path / "rows.pt", weights_only=True))
    after = collection({"a": keys, "b": keys})
    assert all(torch.equal(before[name], after[name]) for name in "ab") and not server.contains([ROWS], "m", 1).any()


def test_rows_of_a_state_dict_are_all_loaded_or_none(rig: Rig, tmp_path: Path) -> None:
    collection = hps.LookupCollection(rig.path, "m", {"a": (0, DIM), "b": ("t1", 3)})
    collection.rows_in_state_dict = True
    good, keys = collection.state_dict()["_extra_state"], torch.arange(ROWS + 5)
    server = SERVERS.open(rig.path)
    server.insert(np.arange(3, ROWS + 5), np.ones((ROWS + 2, DIM)), "m", 0)
    before = collection({"a": keys, "b": keys})
    first, (second_keys, second) = good["rows"]
    wrong = [
        None, 5, [], [first], [first, first], [first, [second_keys]], [first, [second_keys, second[:, :2]]], [first, None],
        [first, [second_keys[1:], second]], [first, [second_keys.float(), second]], [first, [second_keys, second.double()]],
        [first, [second_keys.numpy(), second.numpy()]],
    ]  # fmt: skip
    for rows in wrong:
        with pytest.raises(ConfigError, match="state_dict: rows"):
            collection.load_state_dict({"_extra_state": {**good, "rows": rows}})
    for state in (None, 5, [], {}, {"version": 1}, {"version": 1, "tables": 5}):
        with pytest.raises(ConfigError, match="state_dict: "):
            collection.set_extra_state(state)
    after = collection({"a": keys, "b": keys})
    assert all(torch.equal(before[name], after[name]) for name in "ab")
    collection.load_state_dict({"_extra_state": good})
    assert not server.contains([ROWS], "m", 0).any()
