# %% [markdown]
# # Train the rows of a table: a small recommender on new ids
#
# With `trainable=True`, the backward pass collects gradients of rows, and one of our optimizers applies them in the server: to
# host memory and to every cached copy. Ids are any 64-bit integers; a row is created when its id is first looked up.
#
#     pip install "hps-numba[torch]"
#     python torch_train.py

# %%
from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

NEEDS = ("torch",)
if importlib.util.find_spec("torch") is None:
    sys.exit('torch missing: pip install "hps-numba[torch]"')

import torch

import hps_numba
from hps_numba.frontends import torch as hps

torch.manual_seed(0)
DIM, EVENTS, BATCH = 8, 40_000, 500
device = "cuda" if torch.cuda.is_available() else "cpu"
print("runs on", torch.cuda.get_device_name() if device == "cuda" else "the CPU")
folder = Path(tempfile.mkdtemp())
for name in ("user", "item"):  # ten rows of an older model; all others are created in training
    hps_numba.generate_model(folder / f"{name}.model", 10, DIM)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "shop",
            "sparse_files": [str(folder / "user.model"), str(folder / "item.model")],
            "embedding_table_names": ["user", "item"],
            "embedding_vecsize_per_table": [DIM, DIM],
            "maxnum_catfeature_query_per_table_per_sample": [1, 1],
            "default_value_for_each_table": [0.0, 0.0],
            "deployed_device_list": [0] if device == "cuda" else [],
            "max_batch_size": BATCH,
        }
    ],
}

# %% [markdown]
# ## Data: users like items that match their taste

# %%
random = np.random.default_rng(0)
users, items = (random.integers(-(2**63), 2**63 - 1, count) for count in (400, 200))
who, what = random.integers(0, 400, EVENTS), random.integers(0, 200, EVENTS)
tastes = [random.normal(size=(count, 3)) for count in (400, 200)]
liked = (tastes[0][who] * tastes[1][what]).sum(1) + random.normal(size=EVENTS) * 0.3 > 0
user, item = torch.from_numpy(users[who]).to(device), torch.from_numpy(items[what]).to(device)
label = torch.from_numpy(liked).float().to(device)


# %% [markdown]
# ## The model: rows in the server, a small head in Torch, an optimizer for each


# %%
class Recommender(torch.nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        tables = {"user": ("user", DIM), "item": ("item", DIM)}
        self.rows = hps.LookupCollection(config, "shop", tables, trainable=True, initializer="uniform")
        self.head = torch.nn.Linear(DIM, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        rows = self.rows({"user": user, "item": item})
        return self.head(rows["user"] * rows["item"]).squeeze(-1)


model = Recommender(config).to(device)
rows = hps.Adagrad(model, lr=0.2)
dense = torch.optim.Adam(model.parameters(), lr=0.01)  # rows are not parameters of the model
schedule = torch.optim.lr_scheduler.ExponentialLR(rows, 0.9)
print(sum(weight.numel() for weight in model.parameters()), "weights in the model, rows:", [*hps.trained_rows(model)])

# %%
losses = []
for epoch in range(6):
    total = 0.0
    for start in range(0, EVENTS, BATCH):
        some = slice(start, start + BATCH)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(user[some], item[some]), label[some])
        rows.zero_grad()
        dense.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *hps.trained_rows(model)], 5.0)
        rows.step()
        dense.step()
        total += float(loss.detach()) * BATCH / EVENTS
    schedule.step()
    losses.append(total)
    print(f"epoch {epoch}: loss {total:.3f}")
assert losses[0] > 0.5 and losses[-1] < 0.3

# %% [markdown]
# ## The trained rows are in the server, for every layer and every caller

# %%
server = hps.server_of(config)
print("rows:", {name: table.rows for name, table in server.stats()["shop"].items()})
serving = hps.LookupLayer(config, "shop", "user", DIM)
with torch.no_grad():
    trained = model.rows({"user": user[:5]})["user"]
assert torch.equal(serving(user[:5]), trained)
assert np.array_equal(server.lookup(users[who[:5]], "shop", "user"), trained.cpu())

# %% [markdown]
# ## Save rows, optimizer and head in one file, and continue in another server
#
# The file appears only when it is complete, even if the writer is killed. Another config is another server, as in a new
# process.

# %%
saved = hps.save_checkpoint(folder / "epoch6.npz", rows, dense=model.state_dict())
print("saved", saved, "rows,", (folder / "epoch6.npz").stat().st_size // 1024, "KiB")
(folder / "ps_config.json").write_text(json.dumps(config))
again = Recommender(folder / "ps_config.json").to(device)
assert hps.server_of(folder / "ps_config.json").stats()["shop"]["user"].rows == 10
again.load_state_dict(hps.load_checkpoint(folder / "epoch6.npz", hps.Adagrad(again)))
with torch.no_grad():
    here, there = (one(user[:100], item[:100]) for one in (model, again))
print("the other server gives the same answer:", torch.equal(here, there))
assert torch.equal(here, there)
