# %% [markdown]
# # A table in a Torch model: plug in, compile, export, serve in another process
#
# `LookupLayer` replaces `torch.nn.Embedding`. Its rows are in a server and are not parameters of the model: they are shared by
# all models of the process, can be larger than GPU memory, and can change while graphs run.
#
#     pip install "hps-numba[torch]"
#     python torch_layer.py

# %%
from __future__ import annotations

import importlib.util
import subprocess
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

ROWS, DIM, SLOTS = 20_000, 16, 4
device = "cuda" if torch.cuda.is_available() else "cpu"
print("runs on", torch.cuda.get_device_name() if device == "cuda" else "the CPU")
folder = Path(tempfile.mkdtemp())
hps_numba.generate_model(folder / "table.model", ROWS, DIM)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "demo",
            "sparse_files": [str(folder / "table.model")],
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [SLOTS],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [0] if device == "cuda" else [],
            "max_batch_size": 1024,
        }
    ],
}

# %% [markdown]
# ## Plug it in and compare with `torch.nn.functional.embedding`

# %%
layer = hps.LookupLayer(config, "demo", table_id=0, emb_vec_size=DIM)
model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(SLOTS * DIM, 1)).to(device)
weight = torch.from_numpy(np.fromfile(folder / "table.model" / "emb_vector", np.float32).reshape(ROWS, DIM)).to(device)
keys = torch.randint(0, ROWS, (256, SLOTS), device=device)
print(model[0])
assert torch.equal(layer(keys), torch.nn.functional.embedding(keys, weight))

# %% [markdown]
# ## Compile it into one graph; the next call sees an update of a row

# %%
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
before = compiled(keys)
server = hps.server_of(config)
server.update(keys[0, :1].cpu(), np.zeros((1, DIM), np.float32), "demo", 0)
after = compiled(keys)
changed = (before != after).flatten().nonzero().flatten().tolist()
print("samples changed by the update of one row:", changed)
assert 0 in changed and torch.equal(after, model(keys))
server.update(keys[0, :1].cpu(), weight[keys[0, 0]][None].cpu(), "demo", 0)

# %% [markdown]
# ## Export it and serve it in a new process, which loads the table

# %%
program = torch.export.export(model, (keys,), dynamic_shapes=({0: torch.export.Dim("batch")},))
torch.export.save(program, folder / "program.pt2")
print("exported program:", (folder / "program.pt2").stat().st_size // 1024, "KiB, the table:", weight.nbytes // 1024, "KiB")
script = """
import sys, torch, hps_numba.frontends.torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""
torch.save(keys[:7], folder / "keys.pt")
paths = [str(folder / name) for name in ("program.pt2", "keys.pt", "answer.pt")]
subprocess.run([sys.executable, "-c", script, *paths], check=True)
answer = torch.load(folder / "answer.pt")
print("the new process gives the same answer:", torch.equal(answer, model(keys[:7])))
assert torch.equal(answer, model(keys[:7]))
