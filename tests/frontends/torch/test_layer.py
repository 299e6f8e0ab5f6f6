"""``LookupLayer`` of the Torch front end: rows, devices, compilers, copies and processes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, rig_of, run_program
from support.waiting import join_all

from hps_numba import ConfigError, HpsError, KeyDtypeError, UnknownModelError
from hps_numba.server.registry import SERVERS

torch = pytest.importorskip("torch")

from hps_numba.frontends import torch as hps  # noqa: E402

KEY_TYPES = (torch.int64, torch.int32, torch.uint32, torch.uint64)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(tmp_path: Path, device: str) -> Iterator[Rig]:
    yield rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0], gpucacheper=0.5)
    SERVERS.close()


def layer_of(rig: Rig, **more: Any) -> Any:
    return hps.LookupLayer(rig.path, "m", 0, DIM, **more)


def rows_of(rig: Rig, keys: Any) -> np.ndarray:
    return rig.rows[np.asarray(keys.cpu())]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (2, 3, 4), (1, 2, 1, 2, 3)])
def test_rows_of_keys_of_any_shape(served: Rig, device: str, shape: tuple[int, ...]) -> None:
    keys = torch.randint(0, ROWS, shape, device=device)
    rows = layer_of(served)(keys)
    assert rows.shape == (*shape, DIM) and rows.dtype == torch.float32 and rows.device == keys.device
    assert np.array_equal(rows.cpu(), rows_of(served, keys)) and not rows.requires_grad


@pytest.mark.parametrize("kind", KEY_TYPES)
def test_keys_of_any_type(served: Rig, device: str, kind: Any) -> None:
    keys = torch.tensor([[5, 199]], device=device).to(kind)
    assert np.array_equal(layer_of(served)(keys).cpu(), served.rows[[[5, 199]]])


def test_32_bit_models_take_the_bits(tmp_path: Path, device: str) -> None:
    rig = rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0])
    rig.config["supportlonglong"] = False
    for name in ("t0", "t1"):
        np.arange(2**32 - ROWS, 2**32, dtype=np.int64).tofile(tmp_path / name / "key")
    rig.write()
    keys = torch.tensor([-1, -2], dtype=torch.int32, device=device)
    assert np.array_equal(layer_of(rig)(keys).cpu(), rig.rows[[-1, -2]])
    SERVERS.close()


def test_keys_with_strides(served: Rig, device: str) -> None:
    keys = torch.randint(0, ROWS, (6, 8), device=device)
    for some in (keys.T, keys[::2, 1::3], keys[:, :1].expand(6, 4), keys.flip(0)):
        assert np.array_equal(layer_of(served)(some).cpu(), rows_of(served, some))


def test_unknown_keys_get_the_default(served: Rig, device: str) -> None:
    rows = layer_of(served)(torch.tensor([1, -1, ROWS], device=device)).cpu()
    assert np.array_equal(rows[0], served.rows[1]) and (rows[1:] == 0.25).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rows_of_low_precision(served: Rig, device: str, kind: Any) -> None:
    keys = torch.tensor([3, 4], device=device)
    rows = layer_of(served, output_dtype=kind)(keys)
    assert rows.dtype == kind and torch.equal(rows.cpu(), torch.from_numpy(served.rows[3:5]).to(kind))


@pytest.mark.gpu
def test_gpu_on_the_current_stream(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, deployed_device_list=[0], gpucacheper=0.2)
    layer = layer_of(rig)
    streams = [torch.cuda.Stream() for _ in range(4)]
    answers = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 4]):
            keys = torch.randint(0, ROWS, (500,), device="cuda")
            answers.append((keys, layer(keys)))
    torch.cuda.synchronize()
    assert all(np.array_equal(rows.cpu(), rows_of(rig, keys)) for keys, rows in answers)
    SERVERS.close()


@pytest.mark.gpu
def test_gpu_a_captured_layer_follows_its_keys(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, deployed_device_list=[0], gpucacheper=0.2)
    layer, keys, graph = layer_of(rig), torch.randint(0, ROWS, (300,), device="cuda"), torch.cuda.CUDAGraph()
    layer(keys)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        rows = layer(keys)
    for _ in range(50):
        keys.copy_(torch.randint(0, ROWS, (300,), device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        assert np.array_equal(rows.cpu(), rows_of(rig, keys))
    del graph
    SERVERS.close()


@pytest.mark.gpu
def test_gpu_every_device_in_one_process(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    rig = rig_of(tmp_path, deployed_device_list=list(range(count))[::-1], gpucacheper=0.5)
    layer = layer_of(rig)
    for number in range(count):
        keys = torch.randint(0, ROWS, (100,), device=f"cuda:{number}")
        rows = layer(keys)
        assert rows.device == keys.device and np.array_equal(rows.cpu(), rows_of(rig, keys))
    SERVERS.close()


# -- compilers ----------------------------------------------------------------------------------------


def test_the_operator_passes_the_checks_of_torch(served: Rig, device: str) -> None:
    layer = layer_of(served)
    for keys in (torch.tensor([[1, 2]], device=device), torch.zeros(0, dtype=torch.int64, device=device)):
        torch.library.opcheck(torch.ops.hps_numba.lookup.default, (keys, layer.request, DIM))


def test_the_operator_checks_the_width_of_its_request(served: Rig, device: str) -> None:
    keys = torch.tensor([1, 2], device=device)
    for dim in (DIM - 1, DIM + 1):
        with pytest.raises(ConfigError, match=f"dim: expected {DIM}, as in the request, got {dim}"):
            torch.ops.hps_numba.lookup(keys, layer_of(served).request, dim)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_a_compiled_layer_is_one_graph_and_bakes_no_rows(served: Rig, device: str) -> None:
    model = torch.nn.Sequential(layer_of(served), torch.nn.Flatten(), torch.nn.Linear(3 * DIM, 2)).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7):
        keys = torch.randint(0, ROWS, (n, 3), device=device)
        assert torch.equal(compiled(keys), model(keys))
    SERVERS.open(served.path).update(np.arange(ROWS), np.ones((ROWS, DIM)), "m", 0)
    assert torch.equal(compiled(keys), model[2](torch.ones(7, 3 * DIM, device=device)))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of torch.export.load itself
def test_an_exported_program_has_a_dynamic_batch_and_no_rows(served: Rig, device: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(layer_of(served), torch.nn.Flatten(), torch.nn.Linear(3 * DIM, 2)).to(device)
    keys = torch.randint(0, ROWS, (4, 3), device=device)
    program = torch.export.export(model, (keys,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    more = torch.randint(0, ROWS, (9, 3), device=device)
    assert torch.equal(loaded(more), model(more))
    SERVERS.open(served.path).update(np.arange(ROWS), np.ones((ROWS, DIM)), "m", 0)
    assert torch.equal(loaded(more), model(more))


_SERVE = """
import sys, numpy as np, torch, hps_numba.frontends.torch
program = torch.export.load(sys.argv[1]).module()
np.save(sys.argv[3], program(torch.from_numpy(np.load(sys.argv[2]))).detach().numpy())
scripted = torch.jit.load(sys.argv[4])
assert np.array_equal(scripted(torch.from_numpy(np.load(sys.argv[2]))), program(torch.from_numpy(np.load(sys.argv[2]))))
"""


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_programs_serve_in_another_process(rig: Rig, tmp_path: Path) -> None:
    layer, keys = layer_of(rig), torch.randint(0, ROWS, (4, 3))
    torch.export.save(torch.export.export(layer, (keys,)), tmp_path / "program.pt2")
    torch.jit.script(layer).save(str(tmp_path / "script.pt"))
    np.save(tmp_path / "keys.npy", keys)
    paths = [str(tmp_path / name) for name in ("program.pt2", "keys.npy", "rows.npy", "script.pt")]
    run_program(_SERVE, *paths)
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows_of(rig, keys))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripts_fork_and_wait(served: Rig, device: str) -> None:
    class Two(torch.nn.Module):
        def __init__(self, first: Any, second: Any) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, keys: torch.Tensor) -> torch.Tensor:
            future = torch.jit.fork(self.first, keys)
            other = self.second(keys)
            return torch.cat([torch.jit.wait(future), other], -1)

    two = torch.jit.script(Two(layer_of(served), hps.LookupLayer(served.path, "m", "t1", 3)))
    keys = torch.randint(0, ROWS, (4, 3), device=device)
    for _ in range(10):
        rows = two(keys).cpu()
        assert np.array_equal(rows[..., :DIM], rows_of(served, keys))
        assert np.array_equal(rows[..., DIM:], served.narrow[np.asarray(keys.cpu())])


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="this Torch has no rules for vmap of operators")
@pytest.mark.parametrize("trainable", [False, True])
def test_vmap_takes_a_batch_of_keys_as_one_call(served: Rig, device: str, trainable: bool) -> None:
    layer = layer_of(served, trainable=trainable, initializer="zeros" if trainable else None)
    keys = torch.randint(0, ROWS, (4, 3, 2), device=device)
    for place in range(3):
        rows = torch.vmap(layer, in_dims=place)(keys)
        moved = keys.movedim(place, 0)
        assert rows.shape == (*moved.shape, DIM) and np.array_equal(rows.detach().cpu(), rows_of(served, moved))
        assert rows.requires_grad == trainable
    twice = torch.vmap(torch.vmap(layer), in_dims=1, out_dims=1)(keys)
    assert np.array_equal(twice.detach().cpu(), rows_of(served, keys))
    if trainable:
        rows.sum().backward()
        touched, counts = torch.unique(keys.cpu(), return_counts=True)
        assert torch.equal(layer.rows.touched.cpu(), touched)
        assert torch.equal(layer.rows.grad.cpu(), counts[:, None].float().expand(-1, DIM))


def test_autocast_does_not_change_rows(served: Rig, device: str) -> None:
    keys = torch.randint(0, ROWS, (4,), device=device)
    with torch.autocast(device, torch.bfloat16):
        assert np.array_equal(layer_of(served)(keys).cpu(), rows_of(served, keys))


# -- a good citizen ----------------------------------------------------------------------------------------


def test_it_has_no_parameters_and_shows_what_it_is(rig: Rig) -> None:
    layer = layer_of(rig)
    assert not list(layer.parameters()) and not list(layer.buffers())
    layer.load_state_dict({})
    assert repr(layer) == "LookupLayer(m, 0, 8, output_dtype=torch.float32)"
    head = torch.nn.Sequential(layer, torch.nn.Linear(DIM, 1))
    before = rig.rows.copy()
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    head(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert head[1].weight.grad is not None and np.array_equal(layer(torch.arange(ROWS)), before)


def test_copies_share_the_server(rig: Rig) -> None:
    layer, keys = layer_of(rig), torch.tensor([1, 2])
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(memory, weights_only=False), layer.to("cpu")]
    assert all(np.array_equal(one(keys), rig.rows[1:3]) for one in copies)
    assert len(SERVERS.opened) == 1


def test_several_configs_in_one_process(rig: Rig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = rig_of(other)
    second.rows *= 2
    second.rows.tofile(other / "t0" / "emb_vector")
    hps.Init(Path(rig.path))
    hps.Init(second.config)
    keys = torch.tensor([1, 2])
    assert np.array_equal(layer_of(rig)(keys), rig.rows[1:3])
    assert np.array_equal(hps.LookupLayer(second.config, "m", 0, DIM)(keys), second.rows[1:3])
    assert len(SERVERS.opened) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_layer_imports_nothing_that_its_config_names(rig: Rig) -> None:
    config = {**rig.config, "volatile_db": {"type": "disabled"}, "persistent_db": {"type": "support.fakes:DictTier"}}
    layer, keys = hps.LookupLayer(config, "m", 0, DIM), torch.tensor([1, 2])
    exported = torch.export.export(layer, (keys,)).module()
    for model in (layer, exported, copy.deepcopy(layer)):
        with pytest.raises((ConfigError, RuntimeError), match="a config inside a model never imports anything"):
            model(keys)
    with pytest.raises(HpsError, match="allow_code=True"):
        hps.Init(config)
    hps.Init(config, allow_code=True)
    scripted = torch.jit.script(layer)
    for model in (layer, exported, scripted):
        assert np.array_equal(model(keys), rig.rows[1:3])
    SERVERS.close()
    with pytest.raises(RuntimeError, match="a config inside a model never imports anything"):
        scripted(keys)


def test_an_empty_path_is_the_server_of_init(rig: Rig) -> None:
    layer = hps.LookupLayer("", "m", 0, DIM)
    with pytest.raises(ConfigError, match="no server was initialised"):
        layer(torch.tensor([1]))
    hps.Init(rig.path)
    assert np.array_equal(layer(torch.tensor([1])), rig.rows[[1]])


@pytest.mark.parametrize(
    ("model", "table", "dim", "error", "match"),
    [
        ("x", 0, DIM, UnknownModelError, "'x' is not deployed"),
        ("m", 9, DIM, UnknownModelError, "no table 9"),
        ("m", 0, 7, ConfigError, "emb_vec_size: expected .*, got 7"),
    ],
)
def test_errors_raise(served: Rig, device: str, model: str, table: int, dim: int, error: type[HpsError], match: str) -> None:
    with pytest.raises(error, match=match):
        hps.LookupLayer(served.path, model, table, dim)(torch.tensor([1], device=device))


def test_arguments_that_are_wrong(rig: Rig) -> None:
    for keys in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1], dtype=torch.int8)):
        with pytest.raises(KeyDtypeError, match=r"keys: expected one of int64, int32, uint32, uint64, got "):
            layer_of(rig)(keys)
    with pytest.raises(ConfigError, match=r"output_dtype: expected .*, got float64"):
        layer_of(rig, output_dtype=torch.float64)
    with pytest.raises(ConfigError, match="ps_config_file: expected a path or a dict, got int"):
        hps.LookupLayer(5, "m", 0, DIM)
    for size in (0, 1.5, True, None):
        with pytest.raises(ConfigError, match=rf"emb_vec_size: expected an integer from 1 on, got {size}"):
            hps.LookupLayer(rig.path, "m", 0, size)
    with pytest.raises(ConfigError, match=r"table_id: expected the number or name of a table, got 1\.5"):
        hps.LookupLayer(rig.path, "m", 1.5, DIM)
    assert np.array_equal(hps.LookupLayer(rig.path, "m", np.int64(0), np.int32(DIM))(torch.tensor([1])), rig.rows[[1]])


def test_16_threads(served: Rig, device: str) -> None:
    layer, wrong, start = layer_of(served), [], threading.Barrier(16)

    def work(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        start.wait()
        for _ in range(40):
            keys = torch.randint(0, ROWS, (int(torch.randint(1, 300, (), generator=random)),), generator=random).to(device)
            if not np.array_equal(layer(keys).cpu(), rows_of(served, keys)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not wrong and len(SERVERS.opened) == 1


class Looked(torch.utils.data.Dataset[Any]):
    """Rows that a worker of a DataLoader looks up."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> Any:
        keys = torch.tensor([number, number + 1])
        return keys, self.layer(keys)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader(rig: Rig, start: str) -> None:
    layer = layer_of(rig)
    layer(torch.tensor([1]))  # the server is there before the workers are
    context = multiprocessing.get_context(start)
    loader = torch.utils.data.DataLoader(Looked(layer), batch_size=4, num_workers=2, multiprocessing_context=context)
    seen = [(keys, rows) for keys, rows in loader]
    assert len(seen) == 6 and all(np.array_equal(rows, rows_of(rig, keys)) for keys, rows in seen)


def test_10_000_calls_leak_nothing(rig: Rig) -> None:
    layer, keys = layer_of(rig), torch.randint(0, ROWS, (5000,))

    def resident() -> int:
        text = Path("/proc/self/statm").read_text() if Path("/proc/self/statm").exists() else "0 0"
        return int(text.split()[1]) * 4096

    def grown() -> int:
        before = resident()
        for _ in range(1000):
            layer(keys)
        return resident() - before

    growth = [grown() for _ in range(10)]
    # what calls leave behind grows in each round, once the heap has no room left; what others take or give back is in a few
    assert np.median(growth[5:]) < 1 << 20, growth


# -- many tables, and embeddings of Torch ---------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_collection_asks_for_all_tables_in_one_call(served: Rig, device: str, compiled: bool) -> None:
    layer = hps.LookupCollection(served.path, "m", {"a": (0, DIM), "b": ("t1", 3), "c": (0, DIM)})
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    keys = {"b": torch.randint(0, ROWS, (4, 2), device=device), "a": torch.randint(0, ROWS, (5,), device=device)}
    for features in (["b", "a"], ["a"]):
        rows = call({feature: keys[feature] for feature in features})
        assert list(rows) == features
        for feature in features:
            table = served.rows if feature == "a" else served.narrow
            assert np.array_equal(rows[feature].cpu(), table[np.asarray(keys[feature].cpu())])
    assert layer({}) == {} and "a: 0 [8], b: t1 [3]" in repr(layer)
    with pytest.raises(ConfigError, match="keys: expected features of a, b, c, got x"):
        layer({"x": keys["a"]})
    with pytest.raises(ConfigError, match=r"tables: expected .*, got none"):
        hps.LookupCollection(served.path, "m", {})
    with pytest.raises(KeyDtypeError):
        layer({"a": keys["a"].float()})


@pytest.mark.parametrize("compiled", [False, True])
def test_a_collection_takes_one_tensor_for_all_tables(served: Rig, device: str, compiled: bool) -> None:
    layer = hps.LookupCollection(served.path, "m", {"a": (0, DIM), "c": (0, DIM)})
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for shape in ((2, 5), (2, 3, 4), (2,), (2, 0)):
        keys = torch.randint(0, ROWS, shape, device=device)
        rows = call(keys)
        assert rows.shape == (*shape, DIM) and rows.device == keys.device
        assert np.array_equal(rows.cpu(), served.rows[np.asarray(keys.cpu())])
    turned = torch.randint(0, ROWS, (5, 2), device=device).t()
    assert np.array_equal(layer(turned).cpu(), served.rows[np.asarray(turned.cpu())])
    with pytest.raises(ConfigError, match=r"keys: expected \[2, ...\], .*, got \[3, 5\]"):
        layer(torch.zeros(3, 5, dtype=torch.int64, device=device))
    mixed = hps.LookupCollection(served.path, "m", {"a": (0, DIM), "b": ("t1", 3)})
    with pytest.raises(ConfigError, match=r"keys: expected {feature: keys} for rows of .*, got one tensor"):
        mixed(torch.zeros(2, 5, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        ([(3,), (3,), (3,)], [8, 8, 8]),
        ([(2, 3), (2, 3)], [4, 4]),
        ([(3,), (0,), (5,)], [8, 8, 8]),
        ([(3,), (2, 2), ()], [8, 8, 8]),
        ([(3,), (3,)], [8, 4]),
        ([(3,), (5,)], [3, 3]),
    ],
)
def test_rows_of_several_tables_in_one_tensor(shapes: list[tuple[int, ...]], dims: list[int]) -> None:
    from hps_numba.frontends.torch.collection import _parts_of_one

    keys = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
    rows = _parts_of_one(keys, [some.numel() for some in keys], dims)
    for number, (part, shape, dim) in enumerate(zip(rows, shapes, dims, strict=True)):
        assert part.shape == (*shape, dim) and part.dtype == torch.float32 and part.is_contiguous()
        assert (part.data_ptr() - rows[0].data_ptr()) % 16 == 0
        part.fill_(number)
    for number, part in enumerate(rows):  # none overlaps another
        assert (part == number).all()


class Jagged:
    """As torchrec's ``KeyedJaggedTensor`` describes itself."""

    def __init__(self, features: dict[str, torch.Tensor]) -> None:
        self._features = features

    def keys(self) -> list[str]:
        return list(self._features)

    def values(self) -> torch.Tensor:
        return torch.cat(list(self._features.values()))

    def offset_per_key(self) -> list[int]:
        return [0, *np.cumsum([len(some) for some in self._features.values()]).tolist()]


def test_a_collection_takes_jagged_features(served: Rig, device: str) -> None:
    layer = hps.LookupCollection(served.path, "m", {"a": (0, DIM), "b": ("t1", 3), "c": (0, DIM)})
    features = {name: torch.randint(0, ROWS, (n,), device=device) for name, n in (("c", 4), ("b", 0), ("a", 7))}
    rows = layer(Jagged(features))
    assert list(rows) == ["c", "b", "a"]
    for name, keys in features.items():
        table = served.narrow if name == "b" else served.rows
        assert np.array_equal(rows[name].cpu(), table[np.asarray(keys.cpu())])
    more = layer(Jagged({"x": features["a"], **features, "y": features["c"]}))
    assert list(more) == ["c", "b", "a"] and all(torch.equal(more[name], rows[name]) for name in rows)
    assert layer(Jagged({"x": features["a"]})) == {}  # as torchrec: features without a table are left to others
    with pytest.raises(ConfigError, match=r"keys: expected features of .*, got x"):
        layer({"x": features["a"]})


def test_the_operator_of_collections_passes_the_checks_of_torch(served: Rig, device: str) -> None:
    layer = hps.LookupCollection(served.path, "m", {"a": (0, DIM), "b": ("t1", 3)})
    keys = [torch.tensor([1, 2], device=device), torch.tensor([[3]], device=device)]
    torch.library.opcheck(torch.ops.hps_numba.lookup_many.default, (keys, layer.request_of(["a", "b"]), [DIM, 3]))


@pytest.mark.parametrize("name", ["table.model", "table.h5"])
def test_an_embedding_of_torch_becomes_a_table_and_comes_back(tmp_path: Path, name: str) -> None:
    rig = rig_of(tmp_path)
    embedding = torch.nn.Embedding(150_000, DIM)
    assert hps.save_embedding(embedding, tmp_path / name) == 150_000
    rig.config["models"][0]["sparse_files"][0] = str(tmp_path / name)
    keys = torch.randint(0, 150_000, (100,))
    assert torch.equal(hps.LookupLayer(rig.config, "m", 0, DIM)(keys), embedding(keys))
    back, names = hps.load_embedding(tmp_path / name, freeze=False)
    assert torch.equal(back.weight, embedding.weight) and torch.equal(names, torch.arange(150_000))
    assert back.weight.requires_grad
    SERVERS.close()


def test_keys_of_ones_own_for_an_embedding(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    names = torch.tensor([7, -1, 2**62])
    assert hps.save_embedding(weight, tmp_path / "t.model", keys=names) == 3
    back, read = hps.load_embedding(tmp_path / "t.model")
    assert torch.equal(read, names) and torch.equal(back.weight, weight.float()) and not back.weight.requires_grad
    for wrong, keys, match in (
        (torch.randn(3), None, r"embedding: expected .*, got \[3\] of torch.float32"),
        (torch.zeros(3, 4, dtype=torch.int64), None, "embedding: expected .*, got "),
        ("weights", None, "embedding: expected .*, got str"),
        (weight, [1, 2], r"keys: expected \[3\], one a row, got \[2\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            hps.save_embedding(wrong, tmp_path / "u.model", keys=keys)


# -- the options of torch.nn.Embedding ---------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.0, 0.5, 1e9])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_options_of_an_embedding(served: Rig, device: str, max_norm: float | None, padding_idx: int | None) -> None:
    keys = torch.tensor([[1, 3], [5, 3]], device=device)
    weights = torch.from_numpy(served.rows.copy()).to(device)
    theirs = torch.nn.Embedding.from_pretrained(weights, padding_idx=padding_idx, max_norm=max_norm, sparse=True)
    ours = hps.LookupLayer(served.path, "m", 0, DIM, padding_idx=padding_idx, max_norm=max_norm, sparse=True)
    torch.testing.assert_close(ours(keys), theirs(keys), rtol=1e-5, atol=1e-6)
    assert np.array_equal(SERVERS.open(served.path).lookup([1], "m", 0)[0], served.rows[1])  # the table did not change


@pytest.mark.parametrize("kind", ["LookupLayer", "HPSEmbeddingBag"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("norm_type", 1.0, r"norm_type: expected 2\.0.*, got 1\.0"),
        ("scale_grad_by_freq", True, "scale_grad_by_freq: expected False.*, got True"),
        ("max_norm", -1, "max_norm: expected None or a number from 0 on, got -1"),
        ("max_norm", float("nan"), "max_norm: expected None or a number from 0 on, got nan"),
        ("max_norm", "x", "max_norm: expected a number, got 'x'"),
        ("padding_idx", "x", "padding_idx: expected None or an integer of 64 bits, got 'x'"),
        ("padding_idx", 1.5, r"padding_idx: expected None or an integer of 64 bits, got 1\.5"),
        ("padding_idx", 1 << 64, "padding_idx: expected None or an integer of 64 bits, got 18446744073709551616"),
    ],
)
def test_options_without_effect_are_refused(served: Rig, device: str, kind: str, option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(hps, kind)(served.path, "m", 0, DIM, **{option: value})


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["LookupLayer", "HPSEmbeddingBag"])
def test_options_in_a_script(served: Rig, device: str, kind: str) -> None:
    layer = getattr(hps, kind)(served.path, "m", 0, DIM, max_norm=np.float32(0.5), padding_idx=np.int64(3))
    keys = torch.tensor([[1, 3], [5, 3]], device=device)
    torch.testing.assert_close(torch.jit.script(layer)(keys), layer(keys), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["LookupLayer", "HPSEmbeddingBag", "LookupCollection"])
def test_layers_pickled_by_an_earlier_version(served: Rig, device: str, kind: str) -> None:
    """Version 0.1 kept neither ``read_only`` nor, but for bags, the options of Torch's embeddings."""
    what = {"a": (0, DIM)} if kind == "LookupCollection" else 0
    layer = getattr(hps, kind)(served.path, "m", *([what] if kind == "LookupCollection" else [what, DIM]), trainable=True)
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else dict(vars(layer))
    for name in ("read_only", *(["padding_idx", "max_norm"] if kind == "LookupLayer" else [])):
        del state[name]
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    keys = torch.tensor([[1, 3], [5, 3]], device=device)
    rows, expected = (one({"a": keys})["a"] if kind == "LookupCollection" else one(keys) for one in (old, layer))
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    assert rows.requires_grad and not old.read_only
