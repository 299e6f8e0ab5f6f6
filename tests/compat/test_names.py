"""Every public name of HugeCTR's packages for embedding lookups, with its arguments in order and their defaults."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drop_in import installed, run_drop_in
from support.framework_rig import DIM, Rig, rig_of, tensorflow
from support.waiting import HANG_SECONDS

import hps_numba
from hps_numba.compat.folder import PACKAGES
from hps_numba.compat.out_of_scope import INFERENCE, TRAINING, OutOfScopeError
from hps_numba.server.registry import SERVERS

#: enum: its members in order; int() of a member is its place
ENUMS = {
    "DatabaseType_t": "disabled hash_map parallel_hash_map multi_process_hash_map redis_cluster rocks_db",
    "DatabaseOverflowPolicy_t": "evict_random evict_least_used evict_oldest",
    "UpdateSourceType_t": "null kafka_message_queue",
    "EmbeddingCacheType_t": "Dynamic UVM Static stochastic",
}
#: class of hugectr.inference: its arguments in order, with the defaults that HugeCTR documents (None: it documents none)
REQUIRED = "REQUIRED"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "VolatileDatabaseParams": {
        "type": "parallel_hash_map",
        "address": "127.0.0.1:7000",
        "user_name": "default",
        "password": "",
        "num_partitions": min(16, os.cpu_count() or 1),
        "allocation_rate": None,
        "shared_memory_size": None,
        "shared_memory_name": "hctr_mp_hash_map_database",
        "shared_memory_auto_remove": True,
        "num_node_connections": 5,
        "max_batch_size": 65536,
        "enable_tls": False,
        "tls_ca_certificate": None,
        "tls_client_certificate": None,
        "tls_client_key": None,
        "tls_server_name_identification": None,
        "overflow_margin": None,
        "overflow_policy": "evict_random",
        "overflow_resolution_target": 0.8,
        "initialize_after_startup": True,
        "initial_cache_rate": 1.0,
        "cache_missed_embeddings": False,
        "update_filters": None,
    },
    "PersistentDatabaseParams": {
        "backend": "disabled",
        "path": None,
        "num_threads": 16,
        "read_only": False,
        "max_batch_size": 65536,
        "initialize_after_startup": True,
        "update_filters": None,
    },
    "UpdateSourceParams": {
        "type": "null",
        "brokers": "127.0.0.1:9092",
        "metadata_refresh_interval_ms": 30000,
        "receive_buffer_size": 262144,
        "poll_timeout_ms": 500,
        "max_batch_size": 8192,
        "failure_backoff_ms": 50,
        "max_commit_interval": 32,
    },
    "InferenceParams": {
        "model_name": REQUIRED,
        "max_batchsize": REQUIRED,
        "hit_rate_threshold": REQUIRED,
        "dense_model_file": REQUIRED,
        "sparse_model_files": REQUIRED,
        "device_id": 0,
        "use_gpu_embedding_cache": REQUIRED,
        "cache_size_percentage": REQUIRED,
        "i64_input_key": REQUIRED,
        "use_mixed_precision": False,
        "scaler": 1.0,
        "use_algorithm_search": True,
        "use_cuda_graph": True,
        "number_of_worker_buffers_in_pool": 2,
        "number_of_refresh_buffers_in_pool": 1,
        "thread_pool_size": 16,
        "cache_refresh_percentage_per_iteration": 0.0,
        "deployed_devices": [0],
        "default_value_for_each_table": [0.0],
        "volatile_db": None,
        "persistent_db": None,
        "update_source": None,
        "maxnum_des_feature_per_sample": 26,
        "refresh_delay": 0,
        "refresh_interval": 0,
        "maxnum_catfeature_query_per_table_per_sample": [26],
        "embedding_vecsize_per_table": [128],
        "embedding_table_names": [""],
        "network_file": "",
        "label_dim": 1,
        "slot_num": 10,
        "non_trainable_params_file": "",
        "use_static_table": False,
        "embedding_cache_type": "dynamic",
        "use_context_stream": True,
        "fuse_embedding_table": False,
        "use_hctr_cache_implementation": True,
        "init_ec": True,
        "enable_pagelock": False,
        "fp8_quant": False,
    },
    "ParameterServerConfig": {
        "emb_table_name": REQUIRED,
        "embedding_vec_size": REQUIRED,
        "max_feature_num_per_sample_per_emb_table": REQUIRED,
        "inference_params_array": REQUIRED,
        "volatile_db": None,
        "persistent_db": None,
        "update_source": None,
    },
}
#: function or class: its positional arguments in order; those with a default have one
SIGNATURES = {
    "hugectr.inference.HPS": "ps_config",
    "hugectr.inference.HPS.lookup": "self h_keys model_name table_id device_id=",
    "hugectr.inference.HPS.lookup_fromdlpack": "self keys out_tensor model_name table_id device_id=",
    "hps_torch.LookupLayer": "ps_config_file model_name table_id emb_vec_size",
    "hps_torch.LookupLayer.forward": "self keys",
    "hierarchical_parameter_server.LookupLayer": (
        "model_name table_id emb_vec_size emb_vec_dtype= ps_config_file= global_batch_size="
    ),
    "hierarchical_parameter_server.LookupLayer.call": "self ids max_norm=",
    "hierarchical_parameter_server.SparseLookupLayer": (
        "model_name table_id emb_vec_size emb_vec_dtype= ps_config_file= global_batch_size="
    ),
    "hierarchical_parameter_server.SparseLookupLayer.call": "self sp_ids sp_weights= name= combiner= max_norm=",
}
#: module: the names that are there, besides those above
NAMES = {
    "hugectr": """inference DatabaseType_t DatabaseOverflowPolicy_t UpdateSourceType_t EmbeddingCacheType_t UpdateSourceParams
    __version__""",
    "hugectr.inference": """HPS InferenceParams ParameterServerConfig VolatileDatabaseParams PersistentDatabaseParams
    UpdateSourceParams EmbeddingCacheType_t Dynamic UVM Static stochastic""",
    "hps_torch": "LookupLayer lookup_layer",
    "hps_torch.lookup_layer": "LookupLayer",
    "hierarchical_parameter_server": "Init LookupLayer SparseLookupLayer __version__ core hps_lib",
    "hierarchical_parameter_server.core": """Init LookupLayer SparseLookupLayer initialize lookup_layer sparse_lookup_layer
    lookup_ops utils _version hps_lib""",
    "hierarchical_parameter_server.core.initialize": "Init",
    "hierarchical_parameter_server.core.lookup_layer": "LookupLayer",
    "hierarchical_parameter_server.core.sparse_lookup_layer": "SparseLookupLayer",
    "hierarchical_parameter_server.core.lookup_ops": "lookup",
    "hierarchical_parameter_server.core._version": "__version__",
    "hierarchical_parameter_server.hps_lib": "init lookup",
}
#: values for a model of one table, by the names of InferenceParams
VALUES: dict[str, Any] = {
    "model_name": "m",
    "max_batchsize": 64,
    "hit_rate_threshold": 0.5,
    "dense_model_file": "",
    "sparse_model_files": ["t0"],
    "device_id": 3,
    "use_gpu_embedding_cache": True,
    "cache_size_percentage": 0.25,
    "i64_input_key": False,
    "use_mixed_precision": True,
    "scaler": 2.0,
}


@pytest.fixture
def drop_in() -> Iterator[None]:
    with installed():
        yield
    SERVERS.close()


def imported(name: str) -> Any:
    """A module, or the attribute of one."""
    top = name.split(".")[0]
    if top == "hps_torch":
        pytest.importorskip("torch")
    if top == "hierarchical_parameter_server":
        tensorflow()
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[size:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there(module: str) -> None:
    for name in NAMES[module].split():
        found = imported(f"{module}.{name}")
        assert getattr(importlib.import_module(module), name) is found
        assert not isinstance(found, type) or not issubclass(found, OutOfScopeError)


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("enum", ENUMS)
def test_enums_have_members_numbers_and_texts(enum: str) -> None:
    kind, members = imported(f"hugectr.{enum}"), ENUMS[enum].split()
    assert kind is imported(f"hugectr.inference.{enum}") is getattr(hps_numba, enum)
    assert list(kind.__members__) == members
    for number, name in enumerate(members):
        member = getattr(kind, name)
        assert (member.name, int(member), member) == (name, number, kind(number))
        assert member == member.value == name.lower() and kind(member.value) is member
        assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    for wrong in (-1, len(members), True, 1.0, "no such"):
        with pytest.raises(ValueError, match="is not a valid"):
            kind(wrong)


@pytest.mark.usefixtures("drop_in")
def test_values_of_enums_are_exported_as_by_pybind() -> None:
    for module, enums in (
        ("hugectr", ("DatabaseType_t", "DatabaseOverflowPolicy_t", "UpdateSourceType_t")),
        ("hugectr.inference", ("EmbeddingCacheType_t",)),
    ):
        for enum in enums:
            for name in ENUMS[enum].split():
                assert imported(f"{module}.{name}") is getattr(getattr(hps_numba, enum), name)


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_parameter_classes(name: str) -> None:
    kind = imported(f"hugectr.inference.{name}")
    parameters = inspect.signature(kind).parameters
    by_position = [parameter.name for parameter in parameters.values() if parameter.kind is not parameter.KEYWORD_ONLY]
    in_order = [*ARGUMENTS[name]]
    if name == "InferenceParams":  # its other order is tested by calls
        in_order.remove("device_id")
        in_order.insert(in_order.index("use_mixed_precision"), "device_id")
    assert by_position == in_order
    assert [key for key in by_position if parameters[key].default is inspect.Parameter.empty] == [
        key for key in in_order if ARGUMENTS[name][key] == REQUIRED
    ]
    if name == "ParameterServerConfig":
        return
    made = kind(**{key: VALUES[key] for key, default in ARGUMENTS[name].items() if default == REQUIRED})
    for key, default in ARGUMENTS[name].items():
        assert default in (None, REQUIRED) or getattr(made, key) == default, key


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("given", range(5, 12))
@pytest.mark.parametrize("module", ["hugectr.inference", "hps_numba"])
def test_inference_params_take_device_id_where_hugectr_has_it(module: str, given: int) -> None:
    kind = imported(f"{module}.InferenceParams")
    by_name = kind(**VALUES)
    names = list(VALUES)
    by_position = [VALUES[key] for key in names[:given]]
    assert kind(*by_position, **{key: VALUES[key] for key in names[given:]}) == by_name
    everything = list(ARGUMENTS["InferenceParams"])
    full = {key: getattr(by_name, key) for key in everything}
    assert kind(*full.values()) == by_name
    # and where it is here
    everything.remove("device_id")
    everything.insert(8, "device_id")
    assert kind(*[full[key] for key in everything]) == by_name
    assert kind(*[full[key] for key in everything[:given]], **{key: full[key] for key in everything[given:]}) == by_name


@pytest.mark.usefixtures("drop_in")
def test_inference_params_take_numpy_numbers_and_refuse_what_does_not_fit() -> None:
    kind = imported("hugectr.inference.InferenceParams")
    given = ["m", 64, 1.0, "", ["t0"]]
    assert kind(*given, np.int64(2), np.bool_(True), 0.5, True).device_id == 2
    assert kind(*given, np.bool_(True), 0.5, True, 2).device_id == 2
    assert kind(*given, 1, 0.5, True, 2).use_gpu_embedding_cache == 1  # 1 for True, in the order without device_id
    for args, named in (([*given, 0], {"device_id": 1}), (given[:3], {}), ([*given, 0, True, 0.5, True] * 5, {})):
        with pytest.raises(TypeError, match="argument"):
            kind(*args, **named)
    with pytest.raises(TypeError, match="no_such"):
        kind(*given, 0, True, 0.5, True, no_such=1)


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    positional = [
        parameter.name + ("" if parameter.default is inspect.Parameter.empty else "=")
        for parameter in inspect.signature(imported(name)).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    expected = SIGNATURES[name].split()
    assert [one.rstrip("=") for one in positional[: len(expected)]] == [one.rstrip("=") for one in expected]
    assert all(one.endswith("=") for one in positional[len(expected) :])
    assert all(got.endswith("=") or not want.endswith("=") for got, want in zip(positional, expected))


# -- the server ---------------------------------------------------------------------


def params_of(rig: Rig, inference: Any, **more: Any) -> Any:
    """The rig's config as HugeCTR's objects."""
    files = rig.config["models"][0]["sparse_files"]
    model = inference.InferenceParams(
        "m", 64, 1.0, "", files, 0, True, 0.5, True, default_value_for_each_table=[0.25, 0.5], deployed_devices=[0]
    )
    return inference.ParameterServerConfig(
        emb_table_name={"m": ["t0", "t1"]},
        embedding_vec_size={"m": [DIM, 3]},
        max_feature_num_per_sample_per_emb_table={"m": [4, 4]},
        inference_params_array=[model],
        **more,
    )


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("how", ["object", "ps_config=", "path", "hps_json_config_file=", "config="])
def test_a_server_is_made_as_in_hugectr(tmp_path: Path, how: str) -> None:
    rig, inference = rig_of(tmp_path), imported("hugectr.inference")
    if how in ("object", "ps_config="):
        volatile = inference.VolatileDatabaseParams(imported("hugectr.DatabaseType_t").hash_map)
        given = params_of(
            rig, inference, volatile_db=volatile, persistent_db=inference.PersistentDatabaseParams(backend="none")
        )
    else:
        given = rig.path
    with inference.HPS(**{how[:-1]: given}) if how.endswith("=") else inference.HPS(given) as server:
        assert isinstance(server, hps_numba.HPS)
        rows = server.lookup([3, 5, 10**9], "m", 0)
        assert type(rows) is np.ndarray and rows.dtype == np.float32
        np.testing.assert_array_equal(rows, [rig.rows[3], rig.rows[5], np.full(DIM, 0.25)])


@pytest.mark.usefixtures("drop_in")
def test_lookups_take_the_argument_names_of_hugectr(tmp_path: Path) -> None:
    rig, inference = rig_of(tmp_path), imported("hugectr.inference")
    with inference.HPS(hps_json_config_file=rig.path) as server:
        expected = rig.narrow[[7, 8]]
        named = {"model_name": "m", "table_id": 1}
        np.testing.assert_array_equal(server.lookup(h_keys=[7, 8], **named, device_id=0), expected)
        np.testing.assert_array_equal(server.lookup(keys=[7, 8], **named), expected)
        np.testing.assert_array_equal(server.lookup([7, 8], "m", 1, 0), expected)
        out = np.empty((2, 3), np.float32)
        assert server.lookup(np.array([7, 8]), **named, out=out) is out
        for wrong in ({"h_keys": [1], "keys": [1]}, {"h_keys": [1], "no_such": 1}):
            with pytest.raises(TypeError, match=r"keys|no_such"):
                server.lookup(**wrong, **named)
        with pytest.raises(TypeError, match="h_keys"):
            server.lookup(**named)
    with pytest.raises(TypeError, match="ps_config"):
        inference.HPS()
    with pytest.raises(TypeError, match="same argument"):
        inference.HPS(ps_config=rig.path, hps_json_config_file=rig.path)


@pytest.mark.usefixtures("drop_in")
def test_lookups_answer_with_numpy_whatever_holds_the_keys(tmp_path: Path) -> None:
    rig, inference = rig_of(tmp_path), imported("hugectr.inference")
    torch = pytest.importorskip("torch")
    tf, _, _ = tensorflow()
    with inference.HPS(rig.path) as server:
        for keys in (
            [1, 2],
            (1, 2),
            np.array([1, 2], np.uint64),
            range(1, 3),
            torch.tensor([1, 2]),
            tf.constant([1, 2], tf.int64),
        ):
            rows = server.lookup(h_keys=keys, model_name="m", table_id=0)
            assert type(rows) is np.ndarray
            np.testing.assert_array_equal(rows, rig.rows[1:3])


@pytest.mark.usefixtures("drop_in")
def test_dlpack_lookups_take_the_argument_names_of_hugectr(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rig, inference = rig_of(tmp_path), imported("hugectr.inference")
    with inference.HPS(rig.path) as server:
        keys, out = torch.tensor([4, 5]), torch.empty(2, DIM)
        capsules = {"keys": torch.utils.dlpack.to_dlpack(keys), "out_tensor": torch.utils.dlpack.to_dlpack(out)}
        assert server.lookup_fromdlpack(**capsules, model_name="m", table_id=0, device_id=0) is None
        np.testing.assert_array_equal(out.numpy(), rig.rows[4:6])


# -- layers ---------------------------------------------------------------------


@pytest.mark.usefixtures("drop_in")
def test_attributes_of_the_torch_layer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rig, kind = rig_of(tmp_path), imported("hps_torch.LookupLayer")
    assert kind is imported("hps_torch.lookup_layer.LookupLayer")
    layer = kind(ps_config_file=Path(rig.path), model_name="m", table_id=np.int64(1), emb_vec_size=3)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (one.ps_config_file, one.model_name, one.table_id, one.emb_vec_size) == (rig.path, "m", 1, 3)
        assert torch.equal(one(torch.tensor([[1]])), torch.from_numpy(rig.narrow[[[1]]]))


@pytest.mark.usefixtures("drop_in")
def test_layers_that_were_pickled_by_hugectr_or_an_older_version(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rig, kind = rig_of(tmp_path), imported("hps_torch.LookupLayer")
    arguments = {"ps_config_file": rig.path, "model_name": "m", "table_id": 1, "emb_vec_size": 3}
    theirs = {**torch.nn.Module().__dict__, **arguments, "training": False}
    older = {key: value for key, value in kind(**arguments).__dict__.items() if key not in arguments or key == "emb_vec_size"}
    for state in (theirs, older):
        layer = kind.__new__(kind)
        layer.__setstate__(state)
        assert {name: getattr(layer, name) for name in arguments} == arguments and repr(layer)
        assert torch.equal(layer(torch.tensor([[1]])), torch.from_numpy(rig.narrow[[[1]]]))
        assert layer.training == state["training"]


@pytest.mark.usefixtures("drop_in")
def test_lookups_of_tensorflow_without_a_layer(tmp_path: Path) -> None:
    tf, _, _ = tensorflow()
    rig, hps = rig_of(tmp_path, model="lone"), imported("hierarchical_parameter_server")
    core = imported("hierarchical_parameter_server.core")
    assert hps.LookupLayer is core.LookupLayer and hps.SparseLookupLayer is core.SparseLookupLayer and hps.Init is core.Init
    ids = tf.constant([[1, 2]], tf.int64)
    rows = core.lookup_ops.lookup(ids, "lone", 0, DIM, tf.float32, rig.path, 16)
    np.testing.assert_array_equal(rows.numpy(), rig.rows[[[1, 2]]])
    init = core.hps_lib.init(0, 1, [0], ps_config_file=rig.path, global_batch_size=16)
    assert init.numpy() == b"OK"
    rows = core.hps_lib.lookup(ids, 0, model_name="lone", table_id=1, emb_vec_size=3, dtype=tf.float32)
    np.testing.assert_array_equal(rows.numpy(), rig.narrow[[[1, 2]]])


# -- what is out of scope ---------------------------------------------------------------------


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize(
    "name", [*(f"hugectr.{name}" for name in TRAINING), *(f"hugectr.inference.{name}" for name in INFERENCE)]
)
def test_dense_names_are_imported_and_raise_when_they_are_used(name: str) -> None:
    module = importlib.import_module(name.rpartition(".")[0])
    namespace: dict[str, Any] = {}
    exec(f"from {module.__name__} import {name.rpartition('.')[2]} as kind", namespace)
    kind = namespace["kind"]
    assert kind is imported(name) and not isinstance(3, kind) and name.rpartition(".")[2] not in dir(module)
    for use in (lambda: kind(1, a=2), lambda: kind.Some, lambda: type("Mine", (kind,), {})()):
        with pytest.raises(OutOfScopeError, match="out of scope: hps_numba serves HugeCTR's embedding lookups") as raised:
            use()
        assert isinstance(raised.value, (AttributeError, NotImplementedError, hps_numba.HpsError))
        assert str(raised.value).count("\n") == 0
    assert not hasattr(kind, "Some") and copy.copy(kind) is kind and repr(kind)


@pytest.mark.usefixtures("drop_in")
@pytest.mark.parametrize("module", ["hugectr", "hugectr.inference", "hierarchical_parameter_server.core.utils"])
def test_unknown_names_are_attribute_errors_that_say_what_is_served(module: str) -> None:
    found = imported(module)
    assert not hasattr(found, "no_such_name")
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'no_such_name': hps_numba serves"):
        _ = found.no_such_name
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec(f"from {module} import no_such_name")


@pytest.mark.usefixtures("drop_in")
def test_unknown_modules_are_import_errors_that_say_what_is_served() -> None:
    imported("hugectr")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hugectr\.tools': hps_numba serves") as raised:
        importlib.import_module("hugectr.tools")
    assert raised.value.name == "hugectr.tools"
    assert importlib.util.find_spec("hugectr_of_another_kind") is None


def test_star_imports_give_the_server_of_hugectr() -> None:
    code = (
        "from hugectr.inference import *; from hugectr import *; import hugectr.inference as inference; "
        "print(HPS is inference.HPS, DatabaseType_t.redis_cluster is redis_cluster, Static.name, InferenceParams.__name__)"
    )
    done = run_drop_in("-c", code)
    assert done.stdout.split() == ["True", "True", "Static", "InferenceParams"], done.stderr


def test_importing_hugectr_loads_no_framework_and_no_kernel() -> None:
    code = "import sys, hugectr; print({'numba', 'torch', 'tensorflow', 'keras'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False, timeout=HANG_SECONDS
    )
    assert done.stdout.strip() == "set()", done.stderr
