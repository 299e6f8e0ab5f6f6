"""``torch.ops.hps_torch.hps_embedding_lookup``: HugeCTR's operator, for eager calls, compilers and exporters."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, Rig, rig_of

import hps_numba
from hps_numba.errors import ConfigError, KeyDtypeError, UnknownModelError
from hps_numba.server.registry import SERVERS

torch = pytest.importorskip("torch")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(tmp_path: Path, device: str) -> Iterator[Rig]:
    yield rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0], gpucacheper=0.5)
    SERVERS.close()


def lookup() -> Any:
    importlib.import_module("hps_numba.frontends.torch.hugectr_operator")
    return torch.ops.hps_torch.hps_embedding_lookup


@pytest.mark.parametrize("shape", [(2, 3), (4,), (), (0, 3), (2, 1, 2)])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_rows_of_keys_of_any_shape(rig: Rig, device: str, shape: tuple[int, ...], dtype: str) -> None:
    keys = torch.from_numpy(np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)).to(device)
    rows = lookup()(keys, rig.path, "m", 0, DIM)
    assert rows.dtype == torch.float32 and rows.device == keys.device
    assert torch.equal(rows.cpu(), torch.from_numpy(rig.rows[keys.cpu().numpy()]))
    assert torch.equal(lookup()(keys=keys, ps_config_file=rig.path, model_name="m", table_id=0, emb_vec_size=DIM), rows)


def test_the_schema_is_that_of_hugectr() -> None:
    assert str(lookup().default._schema) == (
        "hps_torch::hps_embedding_lookup(Tensor keys, str ps_config_file, str model_name, int table_id, int emb_vec_size) "
        "-> Tensor"
    )


def test_strided_and_unknown_keys(rig: Rig, device: str) -> None:
    keys = torch.tensor([[1, 2], [3, 10**12]], device=device).T
    expected = torch.from_numpy(np.stack([[rig.rows[1], rig.rows[3]], [rig.rows[2], np.full(DIM, 0.25, np.float32)]]))
    assert torch.equal(lookup()(keys, rig.path, "m", 0, DIM).cpu(), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # of the compiler itself
def test_compiled_exported_and_mapped(rig: Rig, device: str) -> None:
    operator = lookup()

    class Model(torch.nn.Module):
        def forward(self, keys: torch.Tensor) -> torch.Tensor:
            return operator(keys, rig.path, "m", 1, 3) * 2

    keys = torch.arange(6, device=device).reshape(2, 3)
    expected = torch.from_numpy(rig.narrow[keys.cpu().numpy()]).to(device) * 2
    assert torch.equal(torch.compile(Model(), backend="aot_eager", fullgraph=True)(keys), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), (keys,), dynamic_shapes={"keys": {0: batch}})
    assert torch.equal(program.module()(keys.repeat(2, 1)), expected.repeat(2, 1, 1))
    assert torch.equal(program.run_decompositions().module()(keys), expected)
    assert torch.equal(torch.vmap(lambda some: operator(some, rig.path, "m", 1, 3))(keys) * 2, expected)
    on_meta = operator(keys.to("meta"), "no such file", "m", 1, 3)
    assert on_meta.shape == (2, 3, 3) and on_meta.dtype == torch.float32


def test_its_argument_checks_are_those_of_the_layer(rig: Rig, tmp_path: Path, device: str) -> None:
    keys = torch.tensor([[1]], device=device)
    for error, arguments in (
        (UnknownModelError, (keys, rig.path, "other", 0, DIM)),
        (UnknownModelError, (keys, rig.path, "m", 2, DIM)),
        (ConfigError, (keys, rig.path, "m", 0, DIM + 1)),
        (ConfigError, (keys, rig.path, "m", 0, 0)),
        (KeyDtypeError, (keys.float(), rig.path, "m", 0, DIM)),
        (hps_numba.HpsError, (keys, str(tmp_path / "none.json"), "m", 0, DIM)),
    ):
        with pytest.raises(error):
            lookup()(*arguments)
