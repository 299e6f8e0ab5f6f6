# %% [markdown]
# # Export a model, reload it elsewhere, and change rows under it
#
# `torch.export` keeps the dense half and a line of text that names the config and the table, but no rows: the program is small,
# a new process loads it without the code of the model, and later changes of rows are visible.
#
#     pip install "hps-numba[torch]"
#     python torch_export.py

# %%
from __future__ import annotations

import importlib.util
import json
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

torch.manual_seed(0)
ROWS, DIM, SLOTS = 50_000, 16, 3
device = "cuda" if torch.cuda.is_available() else "cpu"
print("runs on", torch.cuda.get_device_name() if device == "cuda" else "the CPU")
folder = Path(tempfile.mkdtemp())
hps_numba.generate_model(folder / "table.model", ROWS, DIM)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "demo",
            "sparse_files": ["table.model"],  # relative to the config
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [SLOTS],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [0] if device == "cuda" else [],
            "max_batch_size": 1024,
        }
    ],
}
(folder / "ps_config.json").write_text(json.dumps(config))


# %% [markdown]
# ## Export a model with a bag of ids and a head for batches of any size


# %%
class Scorer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = hps.HPSEmbeddingBag(folder / "ps_config.json", "demo", 0, DIM, mode="mean")
        self.head = torch.nn.Linear(DIM, 1)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(keys))


model = Scorer().to(device).eval()
keys = torch.randint(0, ROWS, (32, SLOTS), device=device)
program = torch.export.export(model, (keys,), dynamic_shapes=({0: torch.export.Dim("batch")},))
torch.export.save(program, folder / "scorer.pt2")
sizes = [(folder / name).stat().st_size // 1024 for name in ("scorer.pt2", "table.model/emb_vector")]
print(f"the program: {sizes[0]} KiB, the table: {sizes[1]} KiB")

# %% [markdown]
# ## Serve it in a new process, which sees each change of a row

# %%
script = """
import sys, numpy as np, torch
from hps_numba.frontends import torch as hps

program = torch.export.load(sys.argv[1]).module()
keys = torch.load(sys.argv[2])
server = hps.server_of(sys.argv[3])
with torch.inference_mode():
    answers = [program(keys[:7])]
    server.update(keys[0].unique().cpu(), np.zeros((len(keys[0].unique()), 16)), "demo", 0)
    answers.append(program(keys[:7]))
    server.replace_model("demo")  # the rows of the file again
    answers.append(program(keys[:7]))
torch.save([answer.cpu() for answer in answers], sys.argv[4])
"""
torch.save(keys, folder / "keys.pt")
paths = [str(folder / name) for name in ("scorer.pt2", "keys.pt", "ps_config.json", "answers.pt")]
subprocess.run([sys.executable, "-c", script, *paths], check=True)
first, zeroed, again = torch.load(folder / "answers.pt")
with torch.inference_mode():
    here = model(keys[:7]).cpu()
print("the new process gives the same answer:", torch.equal(first, here))
print("the first sample with rows of zeros:", zeroed[0].item(), "equals the bias of the head:", model.head.bias.item())
assert torch.equal(first, here) and torch.equal(again, here)
assert torch.allclose(zeroed[0], model.head.bias.cpu()) and not torch.equal(first, zeroed)

# %% [markdown]
# ## A program loaded in this process uses the server of this process

# %%
loaded = torch.export.load(folder / "scorer.pt2").module()
server = hps.server_of(folder / "ps_config.json")
server.update(keys[5].unique().cpu(), np.ones((len(keys[5].unique()), DIM)), "demo", 0)
with torch.inference_mode():
    assert torch.equal(loaded(keys), model(keys)) and not torch.equal(loaded(keys[:7]).cpu(), here)
print("rows updated here:", keys[5].tolist())
