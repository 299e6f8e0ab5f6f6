"""The walls of the house: imports point down, frameworks stay in their rooms, and importing the package costs nothing.

All by reading the source: nothing of the package is imported here but in a process of its own.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import environment

PACKAGE = Path(__file__).parents[1] / "hps_numba"

#: rooms from the ground up: an import points to a lower row, or stays in its room
ROWS = [
    {"errors", "forks"},
    {"layout", "cache_layout", "devices"},
    {"parts", "memory", "threads", "background", "timer", "progress", "dlpack", "used_memory"},
    {"config", "interop"},
    {"interop_device"},
    {"kernels"},
    {"storage.formats", "storage.epochs"},
    {"storage.model_files", "storage.checkpoint_files", "storage.bin_dump", "storage.table_content"},
    {"storage.host_pooling", "device_bags"},
    {"storage.host_store"},
    {"storage.loading", "storage.tiers"},
    {"cache_place"},
    {"cache_scratch", "cache_link", "cache_policy_memory"},
    {"cache_staging", "cache_index_copy"},
    {"cache_memory"},
    {"cache_pooling"},
    {"cache_policy"},
    {"cache_shape"},
    {"hierarchy", "cache", "stats", "plan", "synthetic", "recording"},
    {"table_caches", "absent", "cache_group"},
    {"session", "refresh"},
    {"table_groups"},
    {"deployment"},
    {"server_lookups"},
    {"simulate.traces"},
    {"parameter_server", "simulate"},
    {"initializers"},
    {"train"},
    {"checkpoints"},
    {"frontends", "compat", ""},  # "" is hps_numba itself: what users import
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, row in enumerate(ROWS) for room in row}

#: who may import a package that is heavy or not always there, wherever in the file that stands
AT_HOME = {
    "torch": {"frontends.torch"},
    "tensorflow": {"frontends.tensorflow"},
    "redis": {"storage.tiers.redis_cluster"},
    "rocksdict": {"storage.tiers.rocks_db"},
    "confluent_kafka": {"storage.updates", "refresh"},
    "pyarrow": {"storage.formats.parquet", "simulate.traces.parquet"},
    "safetensors": {"storage.formats.safetensors"},
    "h5py": {"storage.formats.hdf5"},
    "matplotlib": {"cli", "simulate.plots"},
    "typer": {"cli"},
    "rich": {"cli", "progress"},
    "pydantic": {"config"},
    "pydantic_core": {"config"},
    "llvmlite": {"kernels"},
    "numba": {"kernels", "interop", "cli"},
    "cuda": {"devices", "interop_device", "kernels"},
    "cupy": {"devices", "interop_device", "frontends", "cli"},
    "jax": set(),
}
#: and of these, who may do so at import
AT_IMPORT = {
    "torch": {"frontends.torch"},
    "tensorflow": {"frontends.tensorflow"},
    "typer": {"cli"},
    "pydantic": {"config"},
    "pydantic_core": {"config"},
    "llvmlite": {"kernels"},
    "numba": {"kernels"},
}


class Import(NamedTuple):
    module: str  # of the file, without "hps_numba."
    target: str
    line: int
    at_import: bool  # neither in a function nor for type checkers only

    def __str__(self) -> str:
        return f"hps_numba.{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, at_import
        deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, ast.stmt) and is_for_type_checkers(child):
            deferred = True
        yield from statements(child, at_import and not deferred)


def targets(node: ast.AST) -> list[str]:
    """Modules that a statement or call names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        assert node.module is not None
        return [_submodule(node.module, alias.name) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__", "find_spec"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def _submodule(package: str, name: str) -> str:
    inner = f"{package}.{name}".removeprefix("hps_numba.")
    return f"hps_numba.{inner}" if package.split(".")[0] == "hps_numba" and inner in MODULES else package


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        Import(module, target, getattr(node, "lineno", 0), at_import)
        for module in MODULES
        for node, at_import in statements(tree_of(module))
        for target in targets(node)
    )


def inner_imports() -> Iterator[tuple[Import, str]]:
    """Imports of the package's own modules, with the target without ``hps_numba.``."""
    for one in imports():
        if one.target == "hps_numba":
            yield one, ""
        elif one.target.startswith("hps_numba."):
            yield one, one.target.removeprefix("hps_numba.")


def room_of(module: str) -> str | None:
    """The longest room that a module is in."""
    names = module.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return "" if module == "" else next((prefix for prefix in prefixes if prefix in FLOOR), None)


def is_in(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_the_source_is_found() -> None:
    assert {"", "errors", "parameter_server", "kernels.host_lookup", "storage.tiers.hash_map"} <= MODULES.keys()
    assert len(imports()) > 200
    assert any(not one.at_import for one in imports())


@pytest.mark.parametrize("module", [module for module in MODULES if MODULES[module].stat().st_size])
def test_every_module_has_a_room(module: str) -> None:
    assert room_of(module) is not None or module == "storage", f"give hps_numba.{module} a row in {__file__}"


def test_imports_point_down() -> None:
    wrong = []
    for one, target in inner_imports():
        source, to = room_of(one.module), room_of(target)
        if one.module == "":  # what users import: each name is loaded on first use
            assert not one.at_import or target == "errors", str(one)
        elif source is None or to is None or not (source == to or FLOOR[to] < FLOOR[source]):
            wrong.append(str(one))
    assert wrong == []


def test_the_walls_would_be_noticed() -> None:
    assert FLOOR["session"] > FLOOR["storage.tiers"] > FLOOR["kernels"] > FLOOR["errors"]
    assert [targets(node) for node in ast.parse("from hps_numba import parts, HPS\nimport torch.nn").body] == [
        ["hps_numba.parts", "hps_numba"],
        ["torch.nn"],
    ]
    tree = ast.parse(
        "import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\ntry:\n    import d\nexcept E:\n    pass"
    )
    found = {targets(node)[0]: at_import for node, at_import in statements(tree) if targets(node)}
    assert found == {"a": True, "b": False, "c": False, "d": True}


@pytest.mark.parametrize("package", AT_HOME)
def test_other_packages_stay_in_their_rooms(package: str) -> None:
    mine = [one for one in imports() if one.target.split(".")[0] == package]
    strangers = [str(one) for one in mine if not is_in(one.module, AT_HOME[package])]
    eager = [str(one) for one in mine if one.at_import and not is_in(one.module, AT_IMPORT.get(package, set()))]
    assert strangers == []
    assert eager == []


#: the rooms that a cache is built of
CACHE = {
    *("cache", "cache_place", "cache_scratch", "cache_staging", "cache_link", "cache_memory", "cache_pooling", "cache_group"),
    *("cache_policy", "cache_policy_memory", "cache_index_copy"),
}
#: which rooms see which files of kernels, and the layouts of memory; what is not named here is seen inside kernels only
SHOWN = {
    # counters; where an index begins, and its size
    "layout": {"kernels", "storage", "stats", "session", "cache_link", "cache_index_copy", "plan"},
    "cache_layout": {
        "kernels",
        *CACHE,
        "cache_shape",
        "session",
        "device_bags",
        "table_groups",
        "simulate.geometry",
    },  # sizes of a cache and of a batch
    "kernels.host_epoch": {"storage", "stats", "cache_place", "cache_staging"},  # counts of any thread, publishing
    "kernels.host_evict": {"storage"},
    "kernels.host_gather": {"storage"},
    "kernels.host_lookup": {"storage"},
    "kernels.host_pool": {"storage"},
    "kernels.host_scan": {"storage"},
    "kernels.host_train": {"train", "initializers"},
    "kernels.host_write": {"storage"},
    "kernels.build": CACHE,
    "kernels.launch": CACHE,
    "kernels.cache_image": {"cache"},
    "kernels.cache_pool": {"cache_pooling", "storage", "device_bags"},  # the combiners
    # what a policy is, and how one is loaded; "": users write them
    "kernels.policies._policy": {*CACHE, "cache_shape", "table_caches", "deployment", "simulate", ""},
    "kernels.cache_sketch": {"cache_policy_memory"},  # its size
    "kernels.row_elements": {*CACHE, "cache_shape", "session", "simulate"},  # bytes of a row
    "kernels.associative._algorithm": {"simulate"},  # what a fully associative algorithm is
    "kernels.associative._numbering": {"simulate", "recording"},  # dense numbers for keys, samples of keys
    "kernels.associative._scored": {"simulate.contenders"},
    "kernels.compile": {"cli.doctor"},  # tells where compiled kernels are kept
}


def may_see(module: str, target: str) -> bool:
    return (is_in(module, {"kernels"}) and is_in(target, {"kernels"})) or is_in(module, SHOWN.get(target, set()))


def test_kernels_and_layouts_are_seen_only_where_they_are_shown() -> None:
    behind = {"kernels", "layout", "cache_layout"}
    seen = [(one, target) for one, target in inner_imports() if is_in(target, behind)]
    assert [str(one) for one, target in seen if not may_see(one.module, target)] == []
    assert {target for one, target in seen if not is_in(one.module, {"kernels"})} == set(SHOWN)


def test_kernels_reach_the_driver_and_the_compiler_through_one_file_each() -> None:
    """What CUDA needs is imported when a kernel is built or started, by files that only devices lead to."""
    cuda = [one for one in imports() if re.match(r"cuda\b", one.target)]
    assert {one.module for one in cuda} == {"devices", "interop_device", "kernels.launch"}
    compiler = [one for one in imports() if one.target.startswith("numba.cuda")]
    assert {one.module for one in compiler} == {"kernels.numba_cuda", "interop"}  # interop: arrays of users
    named = [module for module in MODULES for node in ast.walk(tree_of(module)) if is_numba_cuda(node)]
    assert set(named) <= {"kernels.numba_cuda"}
    eager = {
        one.module for one, target in inner_imports() if one.at_import and target in ("kernels.numba_cuda", *LANES_OF_CUDA)
    }
    assert eager == set(LANES_OF_CUDA)
    assert not [str(one) for one, target in inner_imports() if target == "kernels.launch" and one.at_import]


LANES_OF_CUDA = ("kernels.lanes_cuda", "kernels.lanes_cuda_pool", "kernels.lanes_cuda_types")


def is_numba_cuda(node: ast.AST) -> bool:
    """``numba.cuda`` by way of ``numba``."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "numba" and "cuda" in [alias.name for alias in node.names]
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "numba.cuda"


@pytest.mark.parametrize(
    "folder",
    ["storage.formats", "storage.tiers", "cli", "frontends", "kernels.policies", "kernels.associative", "simulate.traces"],
)
def test_parts_of_a_folder_do_not_know_each_other(folder: str) -> None:
    aliases = {("storage.tiers.parallel_hash_map", "storage.tiers.hash_map")}  # the original's two names for one
    wrong = []
    for one, target in inner_imports():
        both = one.module.startswith(f"{folder}.") and target.startswith(f"{folder}.")
        own, other = (name.removeprefix(f"{folder}.").split(".")[0] for name in (one.module, target))
        if both and own != other and not other.startswith("_") and (one.module, target) not in aliases:
            wrong.append(str(one))
    assert wrong == []


def test_no_import_circle() -> None:
    """Also inside a room, modules import each other in one direction."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for one, target in inner_imports():
        if one.at_import and one.module != target:
            edges[one.module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_no_print_and_loggers_named_after_their_module(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print", f"{module}:{node.lineno}: print"
            if called.endswith("getLogger") and not is_in(module, {"cli"}):  # a command sets the level of all loggers
                assert ast.unparse(node.args[0]) in ("__name__", "__package__"), f"{module}:{node.lineno}"
            at_the_root = re.fullmatch(r"logging\.(debug|info|warning|error|exception|critical|log|basicConfig)", called)
            assert not at_the_root or is_in(module, {"cli"}), f"{module}:{node.lineno}: {called}"


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed_silently(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno}: bare except"
            assert not all(isinstance(step, ast.Pass) for step in node.body), f"{module}:{node.lineno}: except: pass"


_FRESH = """
import json, sys, time
start = time.perf_counter()
import hps_numba
seconds = time.perf_counter() - start
names = [name for name in hps_numba.__all__ if name in vars(hps_numba)]
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in sys.modules}), "names": names}))
"""


def fresh(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), timeout=100).stdout


def test_importing_the_package_is_light() -> None:
    runs = [json.loads(fresh(_FRESH)) for _ in range(3)]
    heavy = {"numba", "llvmlite", "torch", "tensorflow", "cupy", "jax", "pydantic", "h5py", "pyarrow", "rich", "typer", "numpy"}
    assert heavy.isdisjoint(runs[0]["modules"])
    assert min(run["seconds"] for run in runs) < 0.5
    assert all(name.endswith(("Error", "Unavailable")) or name == "__version__" for name in runs[0]["names"])


def test_every_public_name_is_there() -> None:
    code = "import hps_numba as h\nfor name in h.__all__: getattr(h, name)\nprint(set(h.__all__) <= set(dir(h)))"
    assert fresh(code).strip() == "True"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        fresh("import hps_numba; hps_numba.no_such_name")
    assert "module 'hps_numba' has no attribute 'no_such_name'" in failed.value.stderr


def test_a_server_loads_no_framework() -> None:
    code = "import hps_numba, sys; hps_numba.HPS; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(ast.literal_eval(fresh(code)))
    assert "numba" in loaded
    assert loaded.isdisjoint({"torch", "tensorflow", "cupy", "jax", "pyarrow", "typer", "matplotlib", "h5py"})


@pytest.mark.parametrize("module", sorted(module for module in MODULES if is_in(module, {"storage", "kernels"})))
def test_names_of_rooms_are_the_fields_terms(module: str) -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}
    assert banned.isdisjoint(itertools.chain.from_iterable(part.strip("_").split("_") for part in module.split(".")))
