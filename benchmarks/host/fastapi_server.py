"""What one writes without us: ``HPS.lookup`` behind FastAPI, with the binary tensors of the Open Inference Protocol.

``python fastapi_server.py CONFIG`` prints its port and serves until it is ended.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

import hps_numba

server = hps_numba.HPS(sys.argv[1])
(model,) = server.config.models
names = {spec.name: spec.table_id for spec in model.tables(server.config.folder)}
app = FastAPI()


@app.get("/v2/models/{name}")
async def metadata(name: str) -> dict[str, Any]:
    """Inputs of the model."""
    inputs = [{"name": table, "datatype": "INT64", "shape": [-1]} for table in names]
    return {"name": name, "platform": "fastapi", "versions": ["1"], "inputs": inputs, "outputs": []}


@app.post("/v2/models/{name}/infer")
async def infer(name: str, request: Request) -> Response:
    """Rows of one table or several."""
    body = await request.body()
    at = int(request.headers["inference-header-content-length"])
    outputs, parts = [], []
    for tensor in json.loads(body[:at])["inputs"]:
        size = tensor["parameters"]["binary_data_size"]
        keys = np.frombuffer(body, np.int64, size // 8, at)
        at += size
        rows = server.lookup(keys, name, names[tensor["name"]])
        shape = {"name": tensor["name"], "datatype": "FP32", "shape": list(rows.shape)}
        outputs.append({**shape, "parameters": {"binary_data_size": rows.nbytes}})
        parts.append(rows.tobytes())
    head = json.dumps({"model_name": name, "outputs": outputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Response(b"".join([head, *parts]), media_type="application/octet-stream", headers=headers)


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"ready: http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[listening])
