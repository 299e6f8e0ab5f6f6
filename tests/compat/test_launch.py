"""``python -m hps_numba.compat`` is ``python``, with HugeCTR's packages, for the process and its children."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.drop_in import installed, run_drop_in
from support.framework_rig import rig_of
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

from hps_numba import __version__, compat
from hps_numba.compat import launch
from hps_numba.compat.folder import NAMES, PACKAGES, with_packages, without_packages
from hps_numba.errors import HpsError

_FACTS = """
import json, os, sys
main = sys.modules["__main__"]
facts = {
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": globals().get("__file__"),
    "package": __package__,
    "spec": getattr(__spec__, "name", None),
    "is main": main.__dict__ is globals(),
    "flags": [sys.flags.dev_mode, sys.flags.optimize, sys.flags.utf8_mode, sys.flags.safe_path, sys.flags.no_user_site],
    "warnings": sys.warnoptions,
    "x": sys._xoptions,
    "unbuffered": sys.stdout.write_through,
    "threads": __import__("threading").active_count(),
    "ours": sorted(name for name in sys.modules if name.startswith("hps_numba")),
}
print(json.dumps(facts))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a script, a package and their neighbours; in it, a folder and a zip that can be run."""
    for place in ("script.py", "module.py", "package/__main__.py", "runnable/__main__.py"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(_FACTS)
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    with zipfile.ZipFile(tmp_path / "runnable.zip", "w") as file:
        file.writestr("__main__.py", _FACTS)
    return tmp_path


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """What ``python`` itself does in the same environment: the oracle."""
    env = environment(PYTHONWARNINGS="ignore", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = f"{PACKAGES}{os.pathsep}{env['PYTHONPATH']}"
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG_SECONDS, check=False, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        ("script.py",),
        ("script.py", "1", "--more", "-m", "x", "-c", "", "a b", "é"),
        ("./script.py", "-h"),
        ("{folder}/script.py", "--help"),
        ("-m", "module", "-a", "b"),
        ("-m", "package", "1"),
        ("-c", _FACTS, "-m", "2"),
        ("-", "1"),
        ("runnable", "1"),
        ("runnable.zip", "1"),
        ("-u", "-X", "utf8", "-O", "script.py", "-O"),
        ("-W", "error::ImportWarning", "-P", "script.py"),
        ("--", "script.py", "--", "1"),
    ],
    ids=lambda arguments: "_".join(word for word in arguments if len(word) < 20),
)
def test_a_process_is_the_same_as_that_of_python(folder: Path, arguments: tuple[str, ...]) -> None:
    words = [word.format(folder=folder) if word.startswith("{folder}") else word for word in arguments]
    options = {"cwd": folder, "input": _FACTS if "-" in words[:1] else ""}
    expected, got = python(*words, **options), run_drop_in(*words, **options)
    assert (got.stdout, got.stderr, got.returncode) == (expected.stdout, expected.stderr, 0)
    assert json.loads(got.stdout)["ours"] == []


@pytest.mark.parametrize(
    "options", [["-O"], ["-X", "dev"], ["-Xdev"], ["-W", "ignore::UserWarning", "-b"], ["-u"], ["-uP"], ["-P"]]
)
def test_options_before_the_command_are_kept(folder: Path, options: list[str]) -> None:
    start = [sys.executable, *options[:-1]]
    joined = [f"{options[-1]}m", "hps_numba.compat"] if options == ["-uP"] else [options[-1], "-m", "hps_numba.compat"]
    env = environment()
    done = subprocess.run(
        [*start, *joined, "script.py"], capture_output=True, text=True, cwd=folder, env=env, timeout=HANG_SECONDS, check=False
    )
    expected = json.loads(python(*options, "script.py", cwd=folder).stdout)
    got = json.loads(done.stdout)
    expected["warnings"].remove("ignore")  # the oracle's PYTHONWARNINGS
    assert got == expected, done.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('a message')", 1),
        ("raise SystemExit", 0),
        ("import neighbour\ndef f():\n    1 / 0\nf()", 1),
        ("this is no Python", 1),
        ("import no_such_module_at_all", 1),
        ("import os; os._exit(4)", 4),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import atexit, threading; atexit.register(lambda: print(__name__)); "
         "threading.Thread(target=lambda: print(__import__('__main__').__file__)).start()", 0),
    ],
)  # fmt: skip
def test_exit_codes_and_tracebacks_are_those_of_python(folder: Path, code: str, status: int) -> None:
    (folder / "ends.py").write_text(code)
    expected, got = python("ends.py", cwd=folder), run_drop_in("ends.py", cwd=folder)
    assert (got.returncode, got.stdout, got.stderr) == (expected.returncode, expected.stdout, expected.stderr)
    assert got.returncode == status


@pytest.mark.parametrize("arguments", [("no_such.py",), ("-m", "no_such_module"), ("package.txt",), ("-m", "package.no_such")])
def test_what_python_cannot_run_fails_as_in_python(folder: Path, arguments: tuple[str, ...]) -> None:
    expected, got = python(*arguments, cwd=folder), run_drop_in(*arguments, cwd=folder)
    assert (got.returncode, got.stderr) == (expected.returncode, expected.stderr) and got.returncode


def test_ctrl_c_reaches_the_script(folder: Path) -> None:
    (folder / "waits.py").write_text(
        "import sys\ntry:\n    print('ready', flush=True); sys.stdin.read()\n"
        "except KeyboardInterrupt:\n    print('clean'); sys.exit(5)"
    )
    command = [sys.executable, "-m", "hps_numba.compat", "waits.py"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment()
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)  # to the process that was started: it is the script
        assert process.stdout.read() == "clean\n" and process.wait(timeout=HANG_SECONDS) == 5


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage(arguments: list[str]) -> None:
    done = run_drop_in(*arguments)
    assert "usage: python -m hps_numba.compat script.py [arguments]" in done.stdout + done.stderr
    assert done.returncode == (0 if arguments else 1)


@pytest.mark.parametrize("option", ["-E", "-I"])
def test_an_interpreter_that_ignores_the_environment_says_what_to_do(folder: Path, option: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hps_numba import compat; compat.main(['script.py'])"
    done = subprocess.run(
        [sys.executable, option, "-c", code], capture_output=True, text=True, cwd=folder, check=False, timeout=HANG_SECONDS
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: python -E and -I ignore PYTHONPATH, which this sets: leave them out, or run hps-numba compat enable\n"
    )


@pytest.mark.parametrize(
    ("command", "options", "module"),
    [
        (["python", "-m", "hps_numba.compat", "-v"], [], "hps_numba.compat"),
        (["python", "-um", "hps_numba.compat"], ["-u"], "hps_numba.compat"),
        (["python", "-bbuPsm", "x"], ["-bbuPs"], "x"),
        (["python", "-X", "dev", "-Wd", "-W", "-m", "-ma.b", "-X"], ["-X", "dev", "-Wd", "-W", "-m"], "a.b"),
        (["python", "-OXm", "-c", "code", "-O"], ["-OXm"], ""),
        (["python", "-uc", "code", "-m", "x"], ["-u"], ""),
        (["python", "--check-hash-based-pycs", "always", "script.py", "-O"], ["--check-hash-based-pycs", "always"], ""),
        (["python", "-", "-O"], [], ""),
        (["python", "--", "-O"], [], ""),
        (["python", "-m"], [], ""),
        (["python"], [], ""),
        ([], [], ""),
    ],
)
def test_the_command_of_an_interpreter_is_read(command: list[str], options: list[str], module: str) -> None:
    assert launch.read_command(command) == (options, module)


@pytest.mark.parametrize(("code", "status"), [("", None), ("import sys; sys.exit(3)", 3), ("import os; os.abort()", 128 + 6)])
def test_a_process_of_another_kind_goes_on_after_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, status: int | None
) -> None:
    """A notebook (``%run -m hps_numba.compat``) or a test run is not replaced."""
    before = dict(os.environ)
    made = tmp_path / "made"
    arguments = ["-c", f"import hugectr; open({str(made)!r}, 'w').close(); {code}"]
    if status is None:
        compat.main(arguments)
    else:
        monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("hps_numba.compat", run_name="__main__")
        assert ended.value.code == status
    assert made.exists() and dict(os.environ) == before


# -- child processes ---------------------------------------------------------------------

_CHILD = "import hugectr; from hugectr.inference import Static; print(Static.name, hugectr.__version__)"
_PARENT = f"""
import multiprocessing, os, subprocess, sys

def ask(queue):
    import hugectr.inference
    queue.put(hugectr.inference.Static.name)

def imported_by_spawn(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=ask, args=(queue,))
    child.start()
    print(method, queue.get(timeout={HANG_SECONDS}))
    child.join()

if __name__ == "__main__":
    child = {_CHILD!r}
    sys.stdout.flush()
    os.system(sys.executable + ' -c "' + child + '"')
    subprocess.run([sys.executable, "-c", child], check=True)
    subprocess.run([sys.executable, "-"], input=child, text=True, check=True)
    replaced = "import os, sys; os.execv(sys.executable, ['python', '-c', sys.argv[1]])"
    subprocess.run([sys.executable, "-c", replaced, child], check=True)
    for method in ("spawn", "forkserver", "fork"):
        imported_by_spawn(method)
"""


def test_child_processes_have_the_packages(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(_PARENT)
    done = run_drop_in("parent.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*[f"Static {__version__}"] * 4, "spawn Static", "forkserver Static", "fork Static"]


def test_child_processes_of_an_interpreter_elsewhere_find_the_checkout(tmp_path: Path) -> None:
    """A checkout that is on the path of the first process only because that one was started in it."""
    child = f"subprocess.run([sys.executable, '-c', {_CHILD!r}], check=True)"
    code = f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); {child}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "hps_numba.compat", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=HANG_SECONDS, check=False)
    assert done.stdout == f"Static {__version__}\n", done.stderr


def test_a_sitecustomize_of_the_user_runs_as_before(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.customized = True\n")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"}
    done = run_drop_in("-c", "import sys, hugectr; print(sys.customized)", env=env)
    assert done.stdout == "True\n", done.stderr


def test_notebooks_and_their_cells_have_the_packages(tmp_path: Path) -> None:
    """A notebook is run by nbclient: kernels, ``!commands`` and ``%%writefile``, ``%run`` and ``%%bash`` cells."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [
        "import hugectr\nfrom hugectr.inference import HPS, InferenceParams",
        "%%writefile part.py\nimport hugectr.inference, sys\nprint('part', hugectr.inference.Static.name, sys.argv[1:])",
        "!{__import__('sys').executable} part.py 1 2",
        "%run part.py 3",
        "import os, sys\nassert os.system(sys.executable + ' part.py') == 0",
    ]
    program = f"""
import nbclient, nbformat.v4 as v4
notebook = v4.new_notebook(cells=[v4.new_code_cell(text) for text in {cells!r}])
nbclient.NotebookClient(notebook, timeout={HANG_SECONDS}, kernel_name="python3").execute()
texts = [out.get("text", "").strip() for cell in notebook.cells for out in cell.outputs]
print("|".join(["", *texts, ""]))
"""
    done = run_drop_in("-c", program, cwd=tmp_path, env={"IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)})
    shown = done.stdout.replace("\r", "").split("|")[1:]  # before it: what os.system printed
    assert [text for text in shown if text.startswith("part S")] == ["part Static ['1', '2']", "part Static ['3']"], (
        done.stdout + done.stderr
    )


# -- install() ---------------------------------------------------------------------


def test_install_serves_this_process_and_its_children(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    with installed():
        import hugectr.inference

        assert Path(hugectr.__file__).is_relative_to(PACKAGES)
        with hugectr.inference.HPS(rig.path) as server:
            assert (server.lookup([1], "m", 0) == rig.rows[1]).all()
        child = subprocess.run(
            [sys.executable, "-c", _CHILD], capture_output=True, text=True, check=False, timeout=HANG_SECONDS
        )
        assert child.stdout == f"Static {__version__}\n", child.stderr


def test_install_for_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(children=False):
        assert os.environ["PYTHONPATH"] == ""
        import hugectr

        assert hugectr.__version__


def test_packages_come_before_others_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("REAL = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with installed():
        import hugectr

        assert not hasattr(hugectr, "REAL")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"}  # as in NVIDIA's containers
    done = run_drop_in("-P", "-c", "import hugectr; print(hasattr(hugectr, 'REAL'))", env=env)
    assert done.stdout == "False\n", done.stderr


def test_a_module_that_was_imported_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hugectr", runpy)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    compat.install(children=False)
    import hugectr

    assert hugectr is runpy


def test_pythonpath_keeps_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = str(PACKAGES)
    assert with_packages("") == with_packages(ours) == ours
    assert (
        with_packages("/a::/b c")
        == f"{ours}:/a::/b c"
        == with_packages(f"/a::/b c:{ours}")
        == with_packages(with_packages("/a::/b c"))
    )
    assert without_packages(f"/a:{ours}:/b") == "/a:/b" and without_packages("") == ""
    monkeypatch.setattr("hps_numba.compat.folder.PACKAGES", Path("/with:colon"))
    with pytest.raises(HpsError, match="PYTHONPATH: expected hps_numba in a folder without ':' in its name, got '/with:colon'"):
        with_packages("")
