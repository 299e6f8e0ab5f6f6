"""The walls of the architecture: the contracts of import-linter in pyproject.toml hold, and what it cannot say.

It cannot say when an import happens, nor leave out the base classes of a folder; so three things are read from the source here:
frameworks and client libraries are imported in one place each, lazily; what plugs into a folder knows none of its neighbours;
and importing the package costs nothing.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

PACKAGE = ROOT / "hps_numba"

#: who may import a package that is heavy or not always there; "now" marks the places that may do so when they are imported
HOMES = {
    "torch": {"frontends.torch": "now", "frontends.triton.dense": "", "metrics.nvtx": ""},
    "tensorflow": {"frontends.tensorflow": "now"},
    "pyarrow": {"storage.formats.parquet": "", "traces.formats.parquet": ""},
    "safetensors": {"storage.formats.safetensors": ""},
    "h5py": {"storage.formats.hdf5": ""},
    "fsspec": {"storage.urls": ""},
    "matplotlib": {"cli": "", "simulate.plots": ""},
    "typer": {"cli": "now"},
    "rich": {"cli": "", "runtime.progress": ""},
    "pydantic": {"config": "now"},
    "pydantic_core": {"config": "now"},
    "llvmlite": {"kernels": "now"},
    "numba": {"kernels": "now", "simulate.algorithms": "now", "arrays.host": "", "cli": ""},
    "cuda": {"device": "", "arrays.cuda_memory": "", "kernels.compiler.launch": ""},
    "cupy": {"device": "", "arrays": "", "frontends": "", "cli": ""},
    "jax": {},
    "pytest": {"testing": "now"},
    "redis": {"storage.redis": ""},
    "confluent_kafka": {"updates._kafka.client": ""},
    "hiredis": {"storage.redis": ""},
    "prometheus_client": {"metrics.collector": ""},
    "opentelemetry": {"metrics.opentelemetry": ""},
    "nvtx": {"metrics.nvtx": ""},
    "grpc": {"frontends.open_inference": "", "cli._serve_load.grpc": ""},
    "google": {"frontends.open_inference": ""},
    "ray": {"frontends.ray_serve": ""},
    "triton_python_backend_utils": {"frontends.triton.python_backend": ""},
    "uvicorn": {"frontends.open_inference.connections": "now", "frontends.open_inference.serving": ""},
    "uvloop": {"frontends.open_inference.serving": ""},
}
#: folders in which a file is a plugin: it may know the base classes of its folder, whose names begin with an underscore
FOLDERS = (
    "storage.formats",
    "storage.tiers",
    "traces.formats",
    "kernels.policies",
    "simulate.algorithms",
    "updates",
    "cli",
    "frontends",
)
#: HugeCTR has two names for one tier
ALIASES = {("storage.tiers.parallel_hash_map", "storage.tiers.hash_map")}
#: what all front ends over a network are made of
SHARED = "frontends.inference"
#: a front end that is another one, run by somebody else
BUILT_ON = {"frontends.ray_serve": "frontends.open_inference"}
#: numba's CUDA target and what needs it, imported only when a kernel is built for a GPU
CUDA_TARGET = {"kernels.compiler.numba_cuda", "kernels.simt.cuda"} | {
    f"kernels.simt.cuda_{part}" for part in ("memory", "parts", "pooling", "probe", "rows", "warp")
}


class Import(NamedTuple):
    module: str  # of the file, without "hps_numba."
    target: str
    line: int
    now: bool  # neither in a function nor for type checkers only

    def __str__(self) -> str:
        return f"hps_numba.{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def statements(node: ast.AST, now: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, now
        deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_type_checkers = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from statements(child, now and not deferred and not for_type_checkers)


def targets(node: ast.AST) -> list[str]:
    """Modules that a statement or call names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, f"line {node.lineno}: imports are absolute"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name.removeprefix("hps_numba.") in MODULES or name == "numba.cuda" else node.module for name in inside]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__", "find_spec"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        Import(module, target, getattr(node, "lineno", 0), now)
        for module in MODULES
        for node, now in statements(tree_of(module))
        for target in targets(node)
    )


def inner_imports() -> Iterator[tuple[Import, str]]:
    """Imports of the package's own modules, with the target without ``hps_numba.``."""
    for one in imports():
        if one.target.startswith("hps_numba."):
            yield one, one.target.removeprefix("hps_numba.")


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def test_the_contracts_of_import_linter_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(NO_COLOR="1"), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout), done.stdout


def test_the_top_of_the_package_is_small() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "plugins"}


def test_the_reader_of_imports_sees_what_it_should() -> None:
    assert len(imports()) > 200
    assert [targets(node) for node in ast.parse("from hps_numba import plugins, HPS\nimport torch.nn").body] == [
        ["hps_numba.plugins", "hps_numba"],
        ["torch.nn"],
    ]
    tree = ast.parse(
        "import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\ntry:\n    import d\nexcept E:\n    raise"
    )
    assert {targets(node)[0]: now for node, now in statements(tree) if targets(node)} == {
        "a": True,
        "b": False,
        "c": False,
        "d": True,
    }


@pytest.mark.parametrize("package", HOMES)
def test_other_packages_are_imported_in_one_place_each(package: str) -> None:
    homes = HOMES[package]
    mine = [one for one in imports() if one.target.split(".")[0] == package]
    strangers = [str(one) for one in mine if not any(is_in(one.module, home) for home in homes)]
    eager = [str(one) for one in mine if one.now and not any(is_in(one.module, home) for home in homes if homes[home])]
    assert strangers == []
    assert eager == []


def test_numbas_cuda_target_is_imported_in_one_file_and_late() -> None:
    assert {one.module for one in imports() if one.target.startswith("numba.cuda")} <= {
        "kernels.compiler.numba_cuda",
        "arrays.host",
    }
    eager = {one.module for one, target in inner_imports() if one.now and target in CUDA_TARGET}
    assert eager == CUDA_TARGET - {"kernels.compiler.numba_cuda"}
    assert not [str(one) for one, target in inner_imports() if target == "kernels.compiler.launch" and one.now]


@pytest.mark.parametrize("folder", FOLDERS)
def test_plugins_of_a_folder_do_not_know_each_other(folder: str) -> None:
    wrong = []
    for one, target in inner_imports():
        both = one.module.startswith(f"{folder}.") and target.startswith(f"{folder}.")
        own, other = (name.removeprefix(f"{folder}.").split(".")[0] for name in (one.module, target))
        known = other.startswith("_") or is_in(target, SHARED) or (one.module, target) in ALIASES
        known = known or any(is_in(one.module, over) and is_in(target, under) for over, under in BUILT_ON.items())
        if both and own != other and not known:
            wrong.append(str(one))
    assert wrong == []


def test_no_two_files_import_each_other() -> None:
    """Also inside a room; imports for type checkers count too."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for one, target in inner_imports():
        if one.module and one.module != target and target in MODULES:
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


#: a command, and HugeCTR's variables, set the level of all loggers of the package
SET_ALL_LOGGERS = ("cli", "runtime.hugectr_log")


@pytest.mark.parametrize("module", MODULES)
def test_no_print_and_loggers_named_after_their_module(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print", f"{module}:{node.lineno}: print"
            if called.endswith("getLogger") and not any(is_in(module, one) for one in SET_ALL_LOGGERS):
                assert ast.unparse(node.args[0]) in ("__name__", "__package__"), f"{module}:{node.lineno}"
            at_the_root = re.fullmatch(r"logging\.(debug|info|warning|error|exception|critical|log|basicConfig)", called)
            assert not at_the_root or is_in(module, "cli"), f"{module}:{node.lineno}: {called}"


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed_silently(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno}: bare except"
            assert not all(isinstance(step, ast.Pass) for step in node.body), f"{module}:{node.lineno}: except: pass"


#: packages of HugeCTR under the names that scripts import, "core" and "utils" among them
NAMED_BY_HUGECTR = "compat.packages"


@pytest.mark.parametrize("module", [module for module in MODULES if not is_in(module, NAMED_BY_HUGECTR)])
def test_modules_are_named_after_what_they_hold(module: str) -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}
    assert banned.isdisjoint(word for name in module.split(".") for word in name.split("_"))


def test_tests_wait_for_hangs_only() -> None:
    """A number of seconds in a test is a bet on how fast a machine is; a wait of under a second gives others a chance."""
    number = r"[1-9][\d_.]*(?=[,)]|$)"
    waits = (
        r"timeout[=(]",
        r"(?<![\"'f])\.join\(",
        r"\.wait\((?=[\d.]+\))",
        r"\.result\(",
        r"(?:alarm|_later)\(",
        r"timedelta\(seconds=",
    )
    limit = re.compile(f"(?:{'|'.join(waits)}){number}")
    tests = ROOT / "tests"
    files = [path for path in sorted(tests.rglob("*.py")) if path != Path(__file__)]
    found = [
        f"{path.relative_to(tests)}:{at}: expected HANG_SECONDS of support.waiting, got {line.strip()}"
        for path in files
        for at, line in enumerate(path.read_text().splitlines(), 1)
        if limit.search(line)
    ]
    assert len(files) > 100 and found == []
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["timeout"] > HANG_SECONDS


_FRESH = """
import json, sys
import hps_numba
names = [name for name in hps_numba.__all__ if name in vars(hps_numba)]
print(json.dumps({"modules": sorted({name.split(".")[0] for name in sys.modules}), "names": names}))
"""


def fresh(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), timeout=HANG_SECONDS).stdout


def test_importing_the_package_is_light() -> None:
    run = json.loads(fresh(_FRESH))
    heavy = {"numba", "llvmlite", "torch", "tensorflow", "cupy", "jax", "pydantic", "h5py", "pyarrow", "rich", "typer", "numpy"}
    assert heavy.isdisjoint(run["modules"])
    assert all(name.endswith(("Error", "Unavailable")) or name == "__version__" for name in run["names"])


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
