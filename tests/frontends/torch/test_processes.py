"""Rows that several processes train together, each with its own server: two real ones, over gloo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, finish, rig_of, start_program

from hps_numba.training.initializers import Normal, initial_rows

torch = pytest.importorskip("torch")

_TRAIN = """
import sys, datetime, numpy as np, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hps_numba.frontends import torch as hps
from support.waiting import HANG_SECONDS

config, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=HANG_SECONDS))
torch.manual_seed(5)
layer = hps.LookupLayer(config, "m", 0, 8, trainable=True, initializer="normal")
other = hps.LookupLayer(config, "m", 1, 3, trainable=True)
model = DistributedDataParallel(torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(4 * 8, 1)))
rows, dense = hps.Adam([layer, other], lr=0.01), torch.optim.SGD(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
generator, losses = torch.Generator().manual_seed(0), []
for number in range(12):
    keys = torch.randint(0, 230, (2, 16, 4), generator=generator)[rank]  # some have no row yet
    target = torch.randn(2, 16, 1, generator=generator)[rank]
    for halves in ((keys[:8], target[:8]), (keys[8:], target[8:])):
        loss = (model(halves[0]) - halves[1]).square().mean() / 2
        if number == 7 and rank == 0:
            loss = loss * float("inf")  # of which both must hear
        if rank == 1 and number % 3 == 0:
            loss = loss + other(halves[0][:1]).sum()  # the other process has no gradient of this table
        scaler.scale(loss).backward()
    for optimizer in (rows, dense):
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *hps.trained_rows(model)], 1.0)
    for optimizer in (rows, dense):
        scaler.step(optimizer)
    scaler.update()
    for optimizer in (rows, dense):
        optimizer.zero_grad()
server = hps.server_of(config)
keys = np.arange(230)
np.savez(f"{folder}/rows{rank}.npz", rows=server.lookup(keys, "m", 0), there=server.contains(keys, "m", 0),
         other=server.lookup(keys, "m", 1), dense=model.module[2].weight.detach().numpy(), scale=scaler.get_scale())
summed = hps.SGD(layer, lr=1.0, reduction="sum")
layer(torch.tensor([3 + rank])).sum().backward()
summed.step()
np.save(f"{folder}/sum{rank}.npy", server.lookup([3, 4], "m", 0))
dist.destroy_process_group()
"""


def alone(rig_rows: np.ndarray, narrow: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What Torch makes of both halves of each batch in one process."""
    torch.manual_seed(5)
    head = torch.nn.Linear(4 * DIM, 1)
    absent = np.full((30, 3), 0.5, np.float32)
    sparse = [torch.nn.Parameter(torch.from_numpy(np.concatenate(both))) for both in ((rig_rows, new), (narrow, absent))]
    rows = torch.optim.SparseAdam(sparse, lr=0.01)
    dense = torch.optim.SGD(head.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        keys = torch.randint(0, 230, (2, 16, 4), generator=generator)
        target = torch.randn(2, 16, 1, generator=generator)
        if number == 7:
            continue
        looked = torch.nn.functional.embedding(keys, sparse[0]).flatten(2)
        loss = (head(looked) - target).square().mean()
        if number % 3 == 0:
            loss = loss + torch.nn.functional.embedding(keys[1, [0, 8]], sparse[1]).sum() / 2  # the mean of two processes
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*head.parameters(), sparse[0]], 1.0)
        for table, seen in zip(sparse, (keys, keys[1, [0, 8]])):
            if table.grad is not None:
                touched = torch.unique(seen)
                some = table.grad[touched]
                table.grad = torch.sparse_coo_tensor(touched[None], some, table.shape, check_invariants=False)
        rows.step()
        dense.step()
        for one in (rows, dense):
            one.zero_grad()
    return sparse[0].detach().numpy(), sparse[1].detach().numpy()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    processes = [start_program(_TRAIN, rig.path, str(tmp_path), str(rank)) for rank in range(2)]
    for process in processes:
        finish(process)
    first, second = (dict(np.load(tmp_path / f"rows{rank}.npz")) for rank in range(2))
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    assert first["scale"] == 128.0 and first["there"][:ROWS].all()
    new = initial_rows(Normal(), np.arange(ROWS, 230), DIM, table="hps_et.m.t0", default=0.25)
    rows, other = alone(rig.rows, rig.narrow, new)
    assert np.allclose(first["rows"][first["there"]], rows[first["there"]], atol=2e-4)
    assert np.allclose(first["other"], other, atol=2e-4) and not np.allclose(first["rows"][:ROWS], rig.rows, atol=1e-2)
    sums = [np.load(tmp_path / f"sum{rank}.npy") for rank in range(2)]
    assert np.array_equal(*sums) and np.allclose(sums[0], first["rows"][[3, 4]] - 1, atol=1e-5)
