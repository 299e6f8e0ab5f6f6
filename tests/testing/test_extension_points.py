"""A tier, a policy, a format and a source of one's own, about 20 lines each: they pass the contract suites and serve rows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.services import Service, cache_of
from support.waiting import HANG_SECONDS

from hps_numba import plugins
from hps_numba.errors import ConfigError, PolicyError
from hps_numba.storage.model_files import open_model

TIER = """
from dataclasses import dataclass
import numpy as np
from hps_numba.storage import Fetched, Tier

@dataclass
class Options:
    shards: int = 4
    name: str = "own"

class Own(Tier):
    Options = Options
    def __init__(self, section, *, wide_keys=True):
        super().__init__(section, wide_keys=wide_keys)
        self.rows = {}
    def fetch(self, table, keys, rows, *, deadline=None):
        found, asked, own = np.zeros(len(keys), bool), 0, self.rows.get(table, {})
        for part in self.batches(len(keys), deadline):
            for i in range(part.start, asked := part.stop):
                found[i] = int(keys[i]) in own
                if found[i]:
                    rows[i] = own[int(keys[i])]
        return Fetched(found, asked)
    def insert(self, table, keys, rows):
        own, dim = self.rows.setdefault(table, {}), rows.shape[1]
        self.check_width(table, next((len(row) for row in own.values()), dim), dim)
        before = len(own)
        own.update((int(key), row.copy()) for key, row in zip(keys, rows))
        return len(own) - before
    def erase(self, table, keys=None):
        if keys is None:
            return len(self.rows.pop(table, ()))
        return sum(self.rows.get(table, {}).pop(int(key), None) is not None for key in keys)
    def size(self, table):
        return len(self.rows.get(table, ()))
    def tables(self):
        return sorted(self.rows)
    def scan(self, table, chunk_rows=65536):
        for key, row in list(self.rows.get(table, {}).items()):
            yield np.array([key]), row[None]
"""

POLICY = """
class MostRecent:
    def first(now, count):
        return -now

    def touch(score, now, count):
        return -now
"""

UNCOMPILABLE = """
class Uncompilable:
    def first(now, count):
        score = now if now >= 0 else (now, count)
        return score

    def touch(score, now, count):
        return now
"""

FORMAT = """
import struct
import numpy as np
from hps_numba.errors import ModelFileError
from hps_numba.storage import SparseModelFormat, SparseModelReader

class Reader(SparseModelReader):
    def __init__(self, path, dim):
        self.file = open(path, "rb")
        magic, rows, width = struct.unpack("<4sqq", self.file.read(20))
        if dim not in (None, width):
            self.file.close()
            raise ModelFileError(f"{path}: expected rows of width {dim}, got {width}")
        super().__init__(path, rows, width, has_meta=False)
    def _fill(self, name, start, out):
        self.file.seek(20 + (8 * start if name == "key" else 8 * self.rows + 4 * self.dim * start))
        self.file.readinto(out)
    def _close(self):
        self.file.close()

class Own(SparseModelFormat):
    name, suffixes, can_write = "own", (".own",), True
    def detect(self, path):
        return path.is_file() and path.read_bytes()[:4] == b"own1"
    def _open(self, path, dim):
        return Reader(path, dim)
    def write(self, path, dim, chunks):
        chunks = [(keys.copy(), rows.copy()) for keys, rows, _ in chunks]
        keys, rows = ([part[i] for part in chunks] for i in range(2))
        total = sum(map(len, keys))
        path.write_bytes(struct.pack("<4sqq", b"own1", total, dim) + b"".join(a.tobytes() for a in (*keys, *rows)))
        return total

PLUGIN = Own()
"""

SOURCE = """
from hps_numba.updates import Position, Update, UpdateSource

BUS, COMMITTED = [], [0]

class Own(UpdateSource):
    def __init__(self, section, **more):
        super().__init__(section, **more)
        self.next = COMMITTED[0] if self.resume else 0
    def poll(self, seconds):
        start, self.next = self.next, len(BUS)
        new = enumerate(BUS[start:], start)
        return [Update(u.table, u.keys, u.rows, Position(0, i), u.event_time_ms, u.version) for i, u in new]
    def commit(self, positions):
        for position in positions:
            COMMITTED[0] = position.offset + 1
"""

SUITES = {
    "tier": (TIER, "from hps_numba.testing import TierContract\nclass TestOwn(TierContract):\n    tier = own.Own\n", 19),
    "policy": (
        POLICY,
        "from hps_numba.testing import PolicyContract\nclass TestOwn(PolicyContract):\n    policy = own.MostRecent\n",
        3,
    ),
    "format": (
        FORMAT,
        "from hps_numba.testing import FormatContract\n"
        "class TestOwn(FormatContract):\n    format, has_meta = own.PLUGIN, False\n",
        25,
    ),
    "source": (
        SOURCE,
        "import pytest\nfrom hps_numba.testing import SourceContract\n"
        "class TestOwn(SourceContract):\n    patience = 2.0  # the bus is a list\n"
        "    @pytest.fixture\n    def open_source(self):\n"
        "        del own.BUS[:]\n        own.COMMITTED[0] = 0\n        return own.Own.from_options\n"
        "    @pytest.fixture\n    def publish(self):\n        return own.BUS.extend\n",
        6,
    ),
}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def run_suite(folder: Path, plugin: str, suite: str) -> tuple[dict[str, int], str]:
    """How many tests passed, failed, ... in a process of its own, and what it printed."""
    written(folder, "own.py", plugin)
    written(folder, "test_own.py", "import own\n" + suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(folder)]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    last = done.stdout.strip().splitlines()[-1]
    counts = re.findall(r"(\d+) (passed|failed|error|skipped|warning)", last)
    return {what: int(count) for count, what in counts}, done.stdout


@pytest.mark.parametrize("kind", SUITES)
def test_a_plugin_in_a_file_passes_its_contract_suite(tmp_path: Path, kind: str) -> None:
    plugin, suite, least = SUITES[kind]
    outcomes, printed = run_suite(tmp_path, plugin, suite)
    assert set(outcomes) == {"passed"}, printed
    assert outcomes["passed"] >= least


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("tier", "row.copy()", "row"),
        ("tier", "asked := part.stop", "part.stop"),
        (
            "policy",
            "def touch(score, now, count):\n        return -now",
            "def touch(score, now, count):\n        return score + 1",
        ),
        ("format", "8 * start if", "8 * start + 8 if"),
        ("source", "COMMITTED[0] = position.offset + 1", "COMMITTED[0] = len(BUS)"),
        ("source", "if self.resume else 0", ""),
        ("source", ", u.version)", ")"),
    ],
)
def test_a_contract_suite_finds_a_wrong_plugin(tmp_path: Path, kind: str, right: str, wrong: str) -> None:
    plugin, suite, _ = SUITES[kind]
    assert right in plugin
    outcomes, _ = run_suite(tmp_path, plugin.replace(right, wrong), suite)
    assert outcomes.get("failed", 0) + outcomes.get("error", 0) > 0


# --- they serve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["slot", "list", "first of a list"])
def test_a_tier_of_ones_own_serves_a_row(workshop: Workshop, form: str) -> None:
    own = {"type": f"{written(workshop.folder, 'own.py', TIER)}:Own", "shards": 7}
    cold = {"type": "hash_map", "initialize_after_startup": False}
    tiers: dict[str, Any] = {
        "slot": {"volatile_db": cold, "persistent_db": own},
        "list": {"tiers": [cold, own]},
        "first of a list": {"tiers": [own, {**own, "name": "second"}]},
    }[form]
    server = workshop.open(workshop.model((range(9), 3)), allow_code=True, **tiers)
    assert_same_bits(server.lookup([3, 8, 3], "m", 0), rows_of([3, 8, 3], 3))
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.host_hits, stats.tier_hits) == (0, 3)
    options = [tier.options for tier in server._loader.slower.tiers]
    assert [(one.shards, one.name) for one in options] == [(7, "own"), (7, "second")][: len(options)]


def test_a_format_of_ones_own_serves_a_row(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server takes the formats of the folder and of entry points; here the folder has one file more."""
    from hps_numba.storage import formats
    from hps_numba.storage.model_files import write_model

    folder = workshop.folder / "more_formats"
    folder.mkdir()
    written(folder, "own.py", FORMAT)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(folder)])
    path = workshop.folder / "table.own"
    write_model(path, 3, [(np.arange(9), rows_of(range(9), 3))])
    server = workshop.open({**workshop.model((range(1), 3)), "sparse_files": [str(path)]})
    assert_same_bits(server.lookup([3, 8], "m", 0), rows_of([3, 8], 3))


def test_a_policy_of_ones_own_decides_in_a_server(on_cpu: Service) -> None:
    own = written(on_cpu.workshop.folder, "own.py", POLICY)
    server = on_cpu.open((range(300), 17), gpucacheper=0.2, cache_policy=f"{own}:MostRecent", allow_code=True)
    keys = np.arange(300)
    for start in range(0, 300, 50):
        assert_same_bits(on_cpu.lookup(server, keys[start : start + 50]), rows_of(keys[start : start + 50], 17))
    assert cache_of(server).policy == f"{own}:MostRecent"


# --- entry points -----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution on the path that brings a tier, a format and a policy, and a tier that cannot be imported."""
    site = tmp_path / "site"
    info = site / "own_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    for module, text in (("own_tier_", TIER), ("own_format_", FORMAT), ("own_policy_", POLICY + UNCOMPILABLE)):
        written(site, f"{module}.py", text)
    written(info, "METADATA", "Metadata-Version: 2.1\nName: own-plugins\nVersion: 1.0\n")
    written(
        info,
        "entry_points.txt",
        "[hps_numba.tiers]\nown_tier = own_tier_:Own\nbroken_tier = no_such_module_:Own\n"
        "[hps_numba.formats]\nown = own_format_:PLUGIN\nbroken = no_such_module_:PLUGIN\nnone = own_format_:Reader\n"
        "[hps_numba.policies]\nmost_recent = own_policy_:MostRecent\nuncompilable = own_policy_:Uncompilable\n",
    )
    monkeypatch.syspath_prepend(site)
    plugins.entry_points.cache_clear()
    yield
    plugins.entry_points.cache_clear()


def test_plugins_of_an_installed_package_need_no_permission(installed: None, on_cpu: Service) -> None:
    assert "own_tier" in plugins.names("hps_numba.storage.tiers")
    cold = {"type": "hash_map", "initialize_after_startup": False}
    tiers = [cold, {"type": "own_tier", "shards": 2}]
    model = on_cpu.model((range(300), 17), gpucacheper=0.2, cache_policy="most_recent")
    server = on_cpu.workshop.open(model, tiers=tiers, cache_on_cpu=True, allow_code=False)
    assert_same_bits(on_cpu.lookup(server, np.arange(300)), rows_of(range(300), 17))
    assert cache_of(server).policy == "most_recent"
    assert server._loader.slower.tiers[0].options.shards == 2


def test_an_installed_format_is_detected_and_a_broken_one_is_left_out(
    installed: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = plugins.load("hps_numba.storage.formats", "own")
    own.write(tmp_path / "table", 3, [(np.arange(4), rows_of(range(4), 3), None)])
    with open_model(tmp_path / "table") as model:
        assert (model.rows, model.dim) == (4, 3)
    assert "format 'broken': cannot load the entry point 'no_such_module_:PLUGIN'" in caplog.text
    assert "format 'none': expected an instance of SparseModelFormat, got <class 'own_format_.Reader'>" in caplog.text


def test_an_installed_policy_that_does_not_compile_is_refused_at_the_start(installed: None, on_cpu: Service) -> None:
    model = on_cpu.model((range(300), 17), gpucacheper=0.2, cache_policy="uncompilable")
    with pytest.raises(PolicyError, match=r"first \(.*own_policy_\.py:\d+\): does not compile for the CPU"):
        on_cpu.workshop.open(model, cache_on_cpu=True)


def test_an_entry_point_that_cannot_be_loaded_says_which(installed: None, workshop: Workshop) -> None:
    with pytest.raises(OSError, match="'broken_tier': cannot load the entry point 'no_such_module_:Own': No module named"):
        workshop.open(workshop.model((range(9), 3)), tiers=[{"type": "broken_tier"}])
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.type: .*; did you mean 'own_tier'"):
        workshop.open(workshop.model((range(9), 3)), tiers=[{"type": "own_tie"}])
