"""The folder is the registry: plugins of the package by file name, and a user's own by reference, run only where allowed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.fakes import DictTier
from support.oracles import assert_same_bits, rows_of
from support.waiting import join_all

import hps_numba
from hps_numba import plugins
from hps_numba.config import json_schema
from hps_numba.errors import ConfigError, HpsError, TierUnavailable
from hps_numba.storage import tiers
from hps_numba.storage.tiers._tier import Tier

TIERS = "hps_numba.storage.tiers"
FOLDERS = [TIERS, "hps_numba.storage.formats"]

OWN_TIER = """
import numpy as np
from hps_numba.storage import Fetched, Tier

class Own(Tier):
    rows = {}
    def fetch(self, table, keys, rows, *, deadline=None):
        found = np.array([(table, int(key)) in self.rows for key in keys], bool)
        for i in np.flatnonzero(found):
            rows[i] = self.rows[table, int(keys[i])]
        return Fetched(found, len(keys))
    def insert(self, table, keys, rows):
        before = len(self.rows)
        self.rows.update({(table, int(key)): row.copy() for key, row in zip(keys, rows)})
        return len(self.rows) - before
    def erase(self, table, keys=None):
        gone = [place for place in self.rows if place[0] == table and (keys is None or place[1] in keys)]
        return len([self.rows.pop(place) for place in gone])
    def size(self, table):
        return sum(place[0] == table for place in self.rows)
    def tables(self):
        return sorted({place[0] for place in self.rows})
    def scan(self, table, chunk_rows=65536):
        for (tag, key), row in list(self.rows.items()):
            if tag == table:
                yield np.array([key]), row[None]
"""


@pytest.mark.parametrize("package", FOLDERS)
def test_names_are_the_files_of_the_folder(package: str) -> None:
    folder = Path(plugins.__file__).parent.joinpath(*package.split(".")[1:])
    files = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    assert plugins.names(package) == files
    assert files


@pytest.mark.parametrize("package", FOLDERS)
def test_every_plugin_loads(package: str) -> None:
    assert all(plugins.load(package, name) is not None for name in plugins.names(package))


@pytest.mark.parametrize("package", FOLDERS)
@pytest.mark.parametrize("error", [ConfigError, TierUnavailable])
def test_an_unknown_name_lists_the_known_ones(package: str, error: type[HpsError]) -> None:
    with pytest.raises(error) as caught:
        plugins.load(package, "no_such_plugin", error=error)
    message = str(caught.value)
    assert "'no_such_plugin' is unknown" in message
    assert all(name in message for name in plugins.names(package))
    assert "\n" not in message


def test_a_typo_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hash_map'"):
        plugins.load(TIERS, "hashmap")


@pytest.mark.parametrize("hidden", ["_tier", "_wrappers", "__init__"])
def test_files_with_an_underscore_are_not_plugins(hidden: str) -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        plugins.load(TIERS, hidden)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package.module:Tier", "cannot import 'no_such_package.module'"),
        ("support.fakes:NoSuchTier", "'support.fakes' has no 'NoSuchTier'"),
        ("{folder}/missing.py:Tier", "missing.py: no such file"),
        ("{folder}/broken.py:Tier", "broken.py: ZeroDivisionError"),
        ("{folder}/wrong.py:Tier", "wrong.py: SyntaxError"),
        ("{folder}/empty.py:Tier", "has no 'Tier'"),
    ],
)
def test_a_reference_that_cannot_be_loaded_is_a_one_line_error(tmp_path: Path, reference: str, message: str) -> None:
    for name, text in (("broken", "1 / 0"), ("wrong", "def"), ("empty", "")):
        (tmp_path / f"{name}.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message) as caught:
        plugins.load(TIERS, reference.format(folder=tmp_path), allow_code=True)
    assert "\n" not in str(caught.value)
    assert not [name for name in set(sys.modules) - before if "broken" in name or "wrong" in name]


def test_a_file_runs_only_where_code_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nTier = 1")
    with pytest.raises(ConfigError, match="allow_code=True"):
        plugins.load(TIERS, f"{tmp_path}/own.py:Tier")
    assert not (tmp_path / "ran").exists()
    assert plugins.load(TIERS, f"{tmp_path}/own.py:Tier", allow_code=True) == 1
    assert (tmp_path / "ran").exists()


def test_a_tier_of_ones_own_in_twenty_lines(workshop: Workshop) -> None:
    own = workshop.folder / "own.py"
    own.write_text(OWN_TIER)
    assert len(OWN_TIER.split("class", 1)[1].splitlines()) <= 22
    entry = workshop.model((range(9), 3))
    server = workshop.open(
        entry,
        volatile_db={"type": "hash_map", "initialize_after_startup": False},
        persistent_db={"type": f"{own}:Own"},
        allow_code=True,
    )
    assert_same_bits(server.lookup([3, 8, 3], "m", 0), rows_of([3, 8, 3], 3))
    assert server.stats()["m"]["sparse_embedding0"].tier_hits == 3
    assert (server.lookup([9], "m", 0) == -7.5).all()
    server.insert([9], rows_of([9], 3), "m", 0)
    assert server.erase([8], "m", 0) == 1
    server.replace_model("m", [workshop.table("new", [3, 4], 3, 1)])
    assert workshop.behind_host(server).size("hps_et.m.sparse_embedding0") == 2
    assert_same_bits(server.lookup([3, 4], "m", 0), rows_of([3, 4], 3, 1))


def test_a_tier_in_a_file_is_refused_without_allow_code(workshop: Workshop) -> None:
    own = workshop.folder / "own.py"
    own.write_text(f"open({str(workshop.folder / 'ran')!r}, 'w').close()\n{OWN_TIER}")
    for place in ("persistent_db", "volatile_db"):
        with pytest.raises(HpsError, match="allow_code=True"):
            workshop.open(workshop.model((range(9), 3)), **{place: {"type": f"{own}:Own"}})
    assert not (workshop.folder / "ran").exists()


@pytest.mark.parametrize("what", ["oracles:rows_of", "oracles:EXTREME_64", "fakes:NaiveStore"])
def test_what_is_not_a_tier_is_refused(workshop: Workshop, what: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"persistent_db\.type: expected a subclass of Tier, got 'support\.{what}', which is "
    ):
        workshop.open(workshop.model((range(9), 3)), persistent_db={"type": f"support.{what}"})


def test_every_tier_of_the_folder_can_be_named_in_a_config(workshop: Workshop) -> None:
    for name in plugins.names(TIERS):
        kind = plugins.load(TIERS, name)
        assert issubclass(kind, Tier)
        if not kind.persistent and not kind.shared:
            server = workshop.open(workshop.model((range(9), 3)), volatile_db={"type": name})
            assert_same_bits(server.lookup([3], "m", 0), rows_of([3], 3))


def test_a_new_file_in_the_tiers_folder_is_a_type_of_its_own(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """One new file, nothing else edited: the config, its schema and the server know it by its file name."""
    folder = workshop.folder / "more_tiers"
    folder.mkdir()
    (folder / "dict_of_mine.py").write_text("from support.fakes import DictTier\n\nPLUGIN = DictTier\n")
    monkeypatch.setattr(tiers, "__path__", [*tiers.__path__, str(folder)])
    server = workshop.open(
        workshop.model((range(5), 4)), volatile_db={"type": "disabled"}, persistent_db={"type": "dict_of_mine"}
    )
    assert np.array_equal(server.lookup(np.arange(5), "m", 0), rows_of(range(5), 4))
    kinds = json_schema()["$defs"]["PersistentDatabaseConfig"]["properties"]["type"]["anyOf"][0]["enum"]
    assert "dict_of_mine" in kinds
    with pytest.raises(hps_numba.ConfigError, match="dict_of_yours"):
        workshop.open(workshop.model((range(5), 4), name="n"), persistent_db={"type": "dict_of_yours"})


def test_a_file_that_is_edited_in_the_same_second_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for value in (11, 22, 33):  # of one size
        file.write_text(f"VALUE = {value}\n")
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert plugins.load_reference(f"{file}:VALUE", allow_code=True) == value
    assert not (tmp_path / "__pycache__").exists()


# --- what a plugin raises while it is imported --------------------------------------------------------------------------


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt", "GeneratorExit", "BaseException('x')", "Odd()"])
@pytest.mark.parametrize("form", ["module", "file", "attribute"])
def test_whatever_a_plugin_raises_becomes_a_typed_error_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str, form: str
) -> None:
    odd = "class Odd(BaseException):\n    def __str__(self): raise ValueError\n"
    name = f"raises_{form}_{abs(hash(raised))}"
    body = f"def __getattr__(name): raise {raised}\n" if form == "attribute" else f"raise {raised}\n"
    (tmp_path / f"{name}.py").write_text(odd + body)
    monkeypatch.syspath_prepend(tmp_path)
    reference = f"{tmp_path}/{name}.py:x" if form == "file" else f"{name}:x"
    with pytest.raises(ConfigError, match=name) as caught:
        plugins.load(TIERS, reference, allow_code=True)
    assert type(caught.value.__cause__).__name__ in raised
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_module_that_ends_the_process_when_imported_does_not() -> None:
    with pytest.raises(ConfigError, match=r"cannot import 'unittest.__main__': SystemExit"):
        plugins.load(TIERS, "unittest.__main__:x", allow_code=True)


def test_a_ctrl_c_of_the_user_interrupts_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    with pytest.raises(KeyboardInterrupt):
        plugins.load(TIERS, f"{tmp_path}/slow.py:x", allow_code=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_module_that_handles_sigint_itself_keeps_its_handler(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nx = 1\n")
    before = signal.getsignal(signal.SIGINT)
    try:
        assert plugins.load(TIERS, f"{tmp_path}/own.py:x", allow_code=True) == 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_import_in_a_thread_is_guarded_too(tmp_path: Path) -> None:
    (tmp_path / "interrupts.py").write_text("raise KeyboardInterrupt")
    found: list[BaseException] = []

    def load() -> None:
        try:
            plugins.load(TIERS, f"{tmp_path}/interrupts.py:x", allow_code=True)
        except BaseException as problem:
            found.append(problem)

    thread = threading.Thread(target=load)
    thread.start()
    join_all(thread)
    assert [type(problem) for problem in found] == [ConfigError]


@pytest.mark.parametrize("name", ["~nobody_of_it/x.py:T", "a\0b.py:T", "loop.py:T", "/dev/null.py:T", "x" * 5000 + ".py:T"])
def test_a_file_name_that_cannot_be_one_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "loop.py").symlink_to("loop.py")
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path):
        with pytest.raises(ConfigError):
            plugins.load(TIERS, name, allow_code=True, folder=folder)


@pytest.mark.parametrize("name", [".x:T", "..:T", ":T", "a..b:T", "a b:T", "a\0b:T", "x" * 5000 + ":T", "os:", "os:a.b"])
def test_a_module_name_that_cannot_be_one_is_a_typed_error(name: str) -> None:
    with pytest.raises(ConfigError):
        plugins.load(TIERS, name, allow_code=True)


@pytest.mark.parametrize("entry", ["", ".", "../{folder}"])
@pytest.mark.parametrize("package", [False, True])
def test_the_working_directory_does_not_hide_an_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, package: bool
) -> None:
    monkeypatch.delitem(sys.modules, "pyclbr", raising=False)
    file = tmp_path / ("pyclbr/__init__.py" if package else "pyclbr.py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nTier = 1")
    (tmp_path / "only_here.py").write_text("Tier = 2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(entry.format(folder=tmp_path.name))
    with pytest.raises(ConfigError, match=r"expected the installed 'pyclbr', got .*pyclbr.*, which hides it"):
        plugins.load(TIERS, "pyclbr:Tier", allow_code=True)
    assert not (tmp_path / "ran").exists() and "pyclbr" not in sys.modules
    assert plugins.load(TIERS, "only_here:Tier", allow_code=True) == 2
    del sys.modules["only_here"]


# --- a tier's own errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [SystemExit(1), ValueError("no"), GeneratorExit(), MemoryError(), RecursionError("deep")])
def test_a_tier_that_cannot_be_opened_is_a_typed_error(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def fail(self: Any, *args: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(DictTier, "__init__", fail)
    with pytest.raises(TierUnavailable, match=r"persistent_db\.type: 'support\.fakes:DictTier': cannot open: ") as caught:
        workshop.open(workshop.model((range(5), 4)), persistent_db={"type": "support.fakes:DictTier"})
    assert caught.value.__cause__ is raised
