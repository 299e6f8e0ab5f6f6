"""``hps-numba compat enable``, ``disable`` and ``status``: HugeCTR's packages for every process of an environment."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT
from support.waiting import HANG_SECONDS
from typer.testing import CliRunner, Result

from hps_numba.cli import build
from hps_numba.compat import environment
from hps_numba.compat.environment import FILE, disable, enable, is_enabled
from hps_numba.compat.folder import NAMES, PACKAGES
from hps_numba.errors import HpsError

_IMPORT = "import hugectr; from hugectr.inference import Static; print(hugectr.__file__, Static.name)"


class Environment:
    """A virtual environment without hps_numba installed, but with what it needs."""

    def __init__(self, folder: Path, checkout: Path = ROOT) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        self.checkout = checkout
        needed = {str(Path(spec.origin).parents[1]) for name in ("numpy", "pydantic", "typer") if (spec := _spec(name)).origin}
        (self.site / "needed.pth").write_text("\n".join(sorted(needed)) + "\n")

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= options.pop("env", {})
        command = [str(self.python), *arguments]
        options.setdefault("cwd", self.python.parent)  # Python has it on its path
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG_SECONDS, check=False, **options)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``hps-numba compat arguments`` of the checkout."""
        return self.run("-m", "hps_numba", "compat", *arguments, env={"PYTHONPATH": str(self.checkout)})


def _spec(name: str) -> Any:
    return importlib.util.find_spec(name)


@pytest.fixture
def fresh(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


def hps(*arguments: str) -> Result:
    return CliRunner().invoke(build(), ["compat", *arguments])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the commands take for that of the environment."""
    monkeypatch.setattr(environment, "site_folder", lambda *, user=False: tmp_path / ("user" if user else "site"))
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


# -- in an environment ---------------------------------------------------------------------


def test_every_process_has_the_packages_after_enable_until_disable(fresh: Environment) -> None:
    assert fresh.run("-c", _IMPORT).returncode == 1
    done = fresh.command("enable")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {fresh.site / FILE}\n", "")
    for options in ((), ("-I",), ("-E", "-s")):  # an environment variable would not do for these
        found = fresh.run(*options, "-c", _IMPORT)
        assert found.stdout.split() == [str(PACKAGES / "hugectr" / "__init__.py"), "Static"], found.stderr
    status = json.loads(fresh.command("status", "--json").stdout)
    assert status["enabled"] and status["files"] == [str(fresh.site / FILE)]
    assert {name: Path(where) for name, where in status["found"].items()} == {
        name: PACKAGES / name / "__init__.py" for name in NAMES
    }
    assert fresh.command("enable").returncode == 0  # again
    done = fresh.command("disable")
    assert done.stdout == f"removed {fresh.site / FILE}\n" and not (fresh.site / FILE).exists()
    assert fresh.run("-c", _IMPORT).returncode == 1
    assert not json.loads(fresh.command("status", "--json").stdout)["enabled"]
    assert [path.name for path in fresh.site.iterdir() if "hps" in path.name] == []


def test_scripts_run_as_they_are_and_ignore_the_environment_too(fresh: Environment, tmp_path: Path) -> None:
    fresh.command("enable")
    (tmp_path / "script.py").write_text(_IMPORT)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hps_numba import compat; compat.main(['script.py'])"
    assert fresh.run("script.py", cwd=tmp_path).stdout.endswith("Static\n")
    assert fresh.run("-I", "-c", code, cwd=tmp_path).stdout.endswith("Static\n")


def test_starting_python_loads_nothing_of_this_package(fresh: Environment) -> None:
    modules = "import sys; print(len(sys.modules), any(n.split('.')[0] in ('hps_numba', 'hugectr') for n in sys.modules))"
    before = fresh.run("-c", modules).stdout.split()
    fresh.command("enable")
    assert fresh.run("-c", modules).stdout.split() == [before[0], "False"]


def test_python_starts_without_a_word_when_the_package_is_gone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "hps_numba", checkout / "hps_numba", ignore=shutil.ignore_patterns("__pycache__"))
    fresh = Environment(tmp_path / "env", checkout)
    assert fresh.command("enable").returncode == 0
    assert fresh.run("-c", _IMPORT).stdout.startswith(str(checkout))
    shutil.rmtree(checkout)
    done = fresh.run("-c", "print('fine')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_package_in_site_packages_is_named_relative_to_it(tmp_path: Path) -> None:
    """So the environment can be moved, and its name may be anything."""
    fresh = Environment(tmp_path / "env")
    shutil.copytree(ROOT / "hps_numba", fresh.site / "hps_numba", ignore=shutil.ignore_patterns("__pycache__"))
    done = fresh.run("-m", "hps_numba", "compat", "enable")
    assert done.returncode == 0, done.stderr
    assert (fresh.site / FILE).read_text().splitlines()[1] == "hps_numba/compat/packages"
    assert fresh.run("-I", "-c", _IMPORT).stdout.startswith(str(fresh.site))


def test_hugectr_itself_keeps_its_names_and_enable_says_so(fresh: Environment, tmp_path: Path) -> None:
    (fresh.site / "hugectr").mkdir()
    (fresh.site / "hugectr" / "__init__.py").write_text("REAL = True\n")
    done = fresh.command("enable")
    where = fresh.site / "hugectr" / "__init__.py"
    assert done.returncode == 0
    assert done.stderr == (
        f"warning: hugectr: new processes find that in {where}; python -m hps_numba.compat script.py takes hps_numba's\n"
    )
    assert fresh.run("-c", "import hugectr; print(hugectr.REAL)").stdout == "True\n"
    env = {"PYTHONPATH": str(ROOT)}
    assert fresh.run("-m", "hps_numba.compat", "-c", _IMPORT, env=env).stdout.startswith(str(PACKAGES))


def test_children_of_another_python_version_get_one_sentence(tmp_path: Path) -> None:
    """They inherit ``PYTHONPATH``, but cannot use packages that were installed for another version."""
    site = tmp_path / "python9.9" / "site-packages"
    shutil.copytree(PACKAGES, site / "hps_numba" / "compat" / "packages", ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(site / "hps_numba" / "compat" / "packages")}
    command = [sys.executable, "-S", "-c", "import hugectr"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=HANG_SECONDS, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: hugectr, hps_torch and hierarchical_parameter_server are those of hps_numba in {site}, and "
        f"{sys.executable} cannot import it: expected python{sys.version_info.major}.{sys.version_info.minor} there"
    )


# -- the file ---------------------------------------------------------------------


def _other_file(path: Path) -> None:
    path.write_text("/another/package\n")


def _empty_file(path: Path) -> None:
    path.write_text("")


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    (path.parent / "target.txt").write_text("precious")
    path.symlink_to("target.txt")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("made", [_other_file, _empty_file, _folder, _link, _dangling, _pipe])
def test_what_is_not_ours_is_not_touched(tmp_path: Path, made: Callable[[Path], None]) -> None:
    path = tmp_path / FILE
    made(path)
    before = (path.lstat().st_mode, path.lstat().st_ino, sorted(tmp_path.iterdir()))
    for call in (enable, disable, is_enabled):
        with pytest.raises(HpsError, match=rf"{path}: expected a file of hps_numba, got .*, remove it by hand"):
            call(tmp_path)
    assert (path.lstat().st_mode, path.lstat().st_ino, sorted(tmp_path.iterdir())) == before


def test_the_file_is_whole_and_readable_by_all(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        path = enable(tmp_path / "new" / "folder")
    finally:
        os.umask(old)
    comment, line = path.read_text().splitlines()
    assert comment.startswith("#") and line == str(PACKAGES) and path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in path.parent.iterdir()] == [FILE]
    assert disable(path.parent) and not disable(path.parent)


@pytest.mark.parametrize("where", ["mkstemp", "fchmod", "replace"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    owner: Any = {"mkstemp": environment.tempfile, "fchmod": os, "replace": Path}[where]
    monkeypatch.setattr(owner, where, refuse)
    with pytest.raises(HpsError, match=rf"{tmp_path}: expected a folder that can be written, got Permission denied; use "):
        enable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    enable(tmp_path)
    tmp_path.chmod(0o555)
    try:
        for call in (enable, disable):
            with pytest.raises(HpsError, match="expected a folder that can be written, got Permission denied"):
                call(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert is_enabled(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(HpsError, match="expected a folder that can be written"):
            enable(folder)
        assert not disable(folder)


def test_a_place_that_the_file_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (tmp_path / "ends with a space ", tmp_path / "two\nlines", tmp_path / "is not there"):
        if bad.name != "is not there":
            bad.mkdir()
        monkeypatch.setattr(environment, "PACKAGES", bad)
        with pytest.raises(HpsError, match=r"expected hps_numba in a folder that a \.pth file can name"):
            enable(tmp_path / "site")
        assert not (tmp_path / "site").exists()


# -- the commands ---------------------------------------------------------------------


def test_the_commands_print_what_they_did(site: Path) -> None:
    done = json.loads(hps("enable", "--json").stdout)
    assert done["written"] == str(site / FILE) and set(done["found"]) == set(NAMES)
    assert str(site / FILE) in hps("status").stdout
    assert json.loads(hps("disable", "--json").stdout) == {"removed": str(site / FILE)}
    assert json.loads(hps("disable", "--json").stdout) == {"removed": None}
    again = hps("disable")
    assert (again.exit_code, again.stdout) == (0, f"nothing to remove: {site / FILE} is not there\n")
    assert hps("status").stdout.startswith("enabled")


def test_the_commands_for_a_user(site: Path) -> None:
    assert hps("enable", "--user").exit_code == 0 and is_enabled(site.parent / "user") and not is_enabled(site)
    assert hps("disable", "--user").exit_code == 0 and not is_enabled(site.parent / "user")


def test_a_failure_is_one_line(site: Path) -> None:
    (site / FILE).write_text("not ours")
    for command in ("enable", "disable", "status"):
        done = hps(command)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr == f"error: {site / FILE}: expected a file of hps_numba, got another, remove it by hand\n"


def test_an_environment_without_the_packages_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.site, "ENABLE_USER_SITE", False)
    with pytest.raises(HpsError, match=r"--user: .* does not use the packages of its user, leave it out"):
        environment.site_folder(user=True)
    monkeypatch.setattr(environment.site, "ENABLE_USER_SITE", True)
    assert environment.site_folder(user=True) == Path(environment.site.getusersitepackages())
    assert environment.site_folder() == Path(sysconfig.get_path("purelib"))


def test_an_interpreter_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HpsError, match="/bin/false: expected it to start, got exit code 1"):
        environment.origins()
