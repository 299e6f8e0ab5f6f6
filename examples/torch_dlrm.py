# %% [markdown]
# # A DLRM-like model: 26 tables in one call, compared with `F.embedding`
#
# The model of Naumov et al. (2019): dense features through an MLP, 26 categorical features through tables, dot products of all
# pairs, and an MLP on top. `LookupCollection` looks up all tables in one call. Here every id is the number of its row, so that
# `torch.nn.functional.embedding` can process the same batches, and the answers can be compared bit by bit.
#
#     pip install "hps-numba[torch]"
#     python torch_dlrm.py

# %%
from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NEEDS = ("torch",)
if importlib.util.find_spec("torch") is None:
    sys.exit('torch missing: pip install "hps-numba[torch]"')

import torch

import hps_numba
from hps_numba.frontends import torch as hps

torch.manual_seed(0)
TABLES, ROWS, DIM, BATCHES = 26, 10_000, 32, (64, 1024)
device = "cuda" if torch.cuda.is_available() else "cpu"
print("runs on", torch.cuda.get_device_name() if device == "cuda" else "the CPU")
folder = Path(tempfile.mkdtemp())
names = [f"feature{number}" for number in range(TABLES)]
for number, name in enumerate(names):
    hps_numba.generate_model(folder / name, ROWS, DIM, seed=number)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "dlrm",
            "sparse_files": [str(folder / name) for name in names],
            "embedding_table_names": names,
            "embedding_vecsize_per_table": [DIM] * TABLES,
            "maxnum_catfeature_query_per_table_per_sample": [1] * TABLES,
            "default_value_for_each_table": [0.0] * TABLES,
            "deployed_device_list": [0] if device == "cuda" else [],
            "max_batch_size": max(BATCHES),
        }
    ],
}

# %% [markdown]
# ## Two sources of rows: a server, and weights in the model


# %%
class InModel(torch.nn.Module):
    """The tables as weights: `F.embedding` 26 times."""

    def __init__(self) -> None:
        super().__init__()
        for name in names:
            weight = np.fromfile(folder / name / "emb_vector", np.float32).reshape(ROWS, DIM)
            self.register_buffer(name, torch.from_numpy(weight))

    def forward(self, keys: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.nn.functional.embedding(some, getattr(self, name)) for name, some in keys.items()}


class Dlrm(torch.nn.Module):
    def __init__(self, rows: torch.nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.bottom = torch.nn.Sequential(torch.nn.Linear(13, 64), torch.nn.ReLU(), torch.nn.Linear(64, DIM), torch.nn.ReLU())
        pairs = (TABLES + 1) * TABLES // 2
        self.top = torch.nn.Sequential(torch.nn.Linear(pairs + DIM, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        self.register_buffer("lower", torch.tril_indices(TABLES + 1, TABLES + 1, -1))

    def forward(self, dense: torch.Tensor, keys: dict[str, torch.Tensor]) -> torch.Tensor:
        bottom = self.bottom(dense)
        vectors = torch.stack([bottom, *self.rows(keys).values()], 1)
        products = vectors @ vectors.mT
        return self.top(torch.cat([bottom, products[:, self.lower[0], self.lower[1]]], 1)).sigmoid()


collection = hps.LookupCollection(config, "dlrm", {name: (name, DIM) for name in names})
served = Dlrm(collection).to(device).eval()
plain = Dlrm(InModel()).to(device).eval()
plain.load_state_dict(served.state_dict(), strict=False)  # the same MLPs; the tables of `served` are not part of its state

# %% [markdown]
# ## Process the same batches with both


# %%
def batch_of(size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Dense features, and ids of which a few are frequent."""
    keys = {name: (torch.rand(size, device=device).pow(3) * ROWS).long() for name in names}
    return torch.rand(size, 13, device=device), keys


def milliseconds(call: Callable[..., object], *inputs: object) -> float:
    """The median time of several calls."""
    times = []
    for _ in range(7):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[2:]))


with torch.inference_mode():
    print(f"milliseconds on {device}, {TABLES} tables of {ROWS} rows, D={DIM}: rows only, then the whole model")
    print("batch   F.embedding  hps_numba   model: F.embedding  hps_numba")
    for size in BATCHES:
        dense, keys = batch_of(size)
        assert all(torch.equal(rows, plain.rows(keys)[name]) for name, rows in served.rows(keys).items())
        assert torch.equal(served(dense, keys), plain(dense, keys))
        rows = [milliseconds(model.rows, keys) for model in (plain, served)]
        whole = [milliseconds(model, dense, keys) for model in (plain, served)]
        print(f"{size:5}   {rows[0]:11.3f}  {rows[1]:9.3f}   {whole[0]:18.3f}  {whole[1]:9.3f}")

# %% [markdown]
# ## What a server adds: new ids, and rows that change while the model serves

# %%
dense, keys = batch_of(64)
with torch.inference_mode():
    before = served(dense, keys)
    keys[names[0]][0] = 5_000_000_000  # not a row number of any weight; it gets the default of its table
    served(dense, keys)
    hps.server_of(config).insert([5_000_000_000], np.ones((1, DIM)), "dlrm", names[0])
    after = served(dense, keys)
print("samples changed by the row of a new id:", (before != after).flatten().nonzero().flatten().tolist())
assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])
