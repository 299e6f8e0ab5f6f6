"""The servers of a process, by config, without any framework."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of

from hps_numba import ArrayError, ClosedError, ConfigError, HpsError, UnknownModelError, plugins
from hps_numba.frontends._queries import Query, TableQuery, answer
from hps_numba.server.registry import Servers


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


def config_of(workshop: Any, *names: str, **entry: Any) -> dict[str, Any]:
    return {"supportlonglong": True, "models": [workshop.model((range(20), 4), name=name, **entry) for name in names or ("m",)]}


def file_of(workshop: Any, config: dict[str, Any], name: str = "ps.json") -> str:
    path = workshop.folder / name
    path.write_text(json.dumps(config))
    return str(path)


def test_equal_configs_share_a_server(workshop: Any, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(workshop)
    path = file_of(workshop, config)
    first = servers.open(path)
    monkeypatch.chdir(workshop.folder)
    assert servers.open("ps.json") is first
    second = servers.open(config)
    assert second is not first and servers.open(json.loads(json.dumps(config))) is second
    assert servers.opened == [first, second]
    first.close()
    assert servers.opened == [second] and servers.open(path) is not first


def test_threads_share_the_server_that_one_of_them_builds(workshop: Any, servers: Servers) -> None:
    config, found, start = config_of(workshop), [], threading.Barrier(8)

    def open_server() -> None:
        start.wait()
        found.append(servers.open(config))

    threads = [threading.Thread(target=open_server) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({id(server) for server in found}) == 1


def test_a_failed_open_can_be_retried(workshop: Any, servers: Servers) -> None:
    config = config_of(workshop)
    path = file_of(workshop, {**config, "models": []})
    with pytest.raises(ConfigError):
        servers.open(path)
    file_of(workshop, config)
    assert servers.open(path).models == ("m",)


@pytest.mark.parametrize(
    ("batch", "replicas", "match"),
    [
        (0, 1, "global_batch_size: expected at least 1, got 0"),
        (3, 2, "global_batch_size: expected a multiple of the 2 replicas, got 3"),
        (10, 2, r"5 for each of 2 replicas, but models\[0\].max_batch_size is 4"),
    ],
)
def test_open_refuses_a_batch_that_replicas_cannot_share(
    workshop: Any, servers: Servers, batch: int, replicas: int, match: str
) -> None:
    config = config_of(workshop)
    with pytest.raises(ConfigError, match=match):
        servers.open(config, global_batch_size=batch, replicas=replicas)
    assert servers.opened == []
    servers.open(config, global_batch_size=8, replicas=2)
    servers.open(config, global_batch_size=batch, replicas=replicas)  # the server is there: the first call decides


def test_an_empty_config_finds_the_only_server_with_the_model(workshop: Any, servers: Servers) -> None:
    with pytest.raises(ConfigError, match="ps_config_file: expected a path or a dict, got an empty one"):
        servers.of_model("", "m")
    first = servers.open(config_of(workshop, "a", "b"))
    second = servers.open(config_of(workshop, "b", "c"))
    assert servers.of_model("", "a") is first and servers.of_model("", "c") is second
    with pytest.raises(UnknownModelError, match="several have it"):
        servers.of_model("", "b")
    with pytest.raises(UnknownModelError, match=r"'d' without ps_config_file.* they have a, b, c"):
        servers.of_model("", "d")


def test_lookup_into_writes_float32_rows(workshop: Any, servers: Servers) -> None:
    server = servers.open(config_of(workshop, output_dtype="float16"))
    out = np.empty((2, 3, 4), np.float32)
    keys = np.arange(6).reshape(2, 3).astype(np.uint32)
    server.direct.lookup_into(keys, "m", 0, out)
    assert np.array_equal(out, rows_of(keys, 4))
    for wrong in (np.empty((2, 3, 5), np.float32), np.empty((2, 3, 4)), np.empty((2, 3, 8), np.float32)[..., ::2]):
        with pytest.raises(ArrayError, match=r"out: expected contiguous writable float32\[2, 3, 4\], got float"):
            server.direct.lookup_into(keys, "m", 0, wrong)


def test_a_missing_config_file_is_named(workshop: Any, servers: Servers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        servers.open(str(tmp_path / "nothing.json"))


# --- code that a config names ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_tier(workshop: Any) -> str:
    """A reference to a tier in a file; the file ``ran`` says that it was imported."""
    ran = workshop.folder / "ran"
    text = f"open({str(ran)!r}, 'w').close()\nfrom support.fakes import DictTier as Own\n"
    (workshop.folder / "own.py").write_text(text)
    return f"{workshop.folder}/own.py:Own"


def with_tier(workshop: Any, kind: str) -> dict[str, Any]:
    return {**config_of(workshop), "volatile_db": {"type": "disabled"}, "persistent_db": {"type": kind}}


@pytest.mark.parametrize("form", ["dict", "file"])
def test_a_config_from_a_model_imports_nothing_unless_the_program_opened_it_before(
    workshop: Any, servers: Servers, own_tier: str, form: str
) -> None:
    """The permission is that of the call which builds the server; a layer then shares it, and imports nothing itself."""
    config: Any = with_tier(workshop, own_tier)
    config = file_of(workshop, config) if form == "file" else config
    layer = Query(config, (TableQuery("m", 0, 4),)).to_json()
    keys = [np.arange(4)]
    for refused in (
        lambda: answer(layer, keys, servers),
        lambda: servers.open(config),
        lambda: servers.open(config, allow_code=True, from_model=True),
    ):
        with pytest.raises(HpsError, match="allow_code=True"):
            refused()
    assert not (workshop.folder / "ran").exists()
    server = servers.open(config, allow_code=True)
    assert (workshop.folder / "ran").exists()
    assert servers.open(config) is server
    assert np.array_equal(answer(layer, keys, servers)[0], rows_of(range(4), 4))
    server.close()
    with pytest.raises(HpsError, match="allow_code=True"):
        answer(layer, keys, servers)  # a server that is built again is allowed nothing again


def test_permission_for_one_config_is_none_for_another(workshop: Any, servers: Servers, own_tier: str) -> None:
    servers.open(with_tier(workshop, own_tier), allow_code=True)
    other = {**with_tier(workshop, own_tier), "models": [workshop.model((range(3), 4), name="n")]}
    with pytest.raises(HpsError, match="allow_code=True"):
        servers.open(other)
    with pytest.raises(ConfigError, match="names code, and a config inside a model never imports anything"):
        servers.of_model(other, "n")


@pytest.mark.parametrize("place", ["tier", "policy"])
def test_a_config_from_a_model_does_not_import_an_installed_plugin(
    workshop: Any, servers: Servers, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """An installed plugin needs no permission, but a model does not choose when it is imported."""
    ran = workshop.folder / "ran"
    (workshop.folder / "own_plugin_.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom support.fakes import DictTier as Tier\n"
        "from hps_numba.kernels.policies.lru import PLUGIN as Policy\n"
    )
    monkeypatch.syspath_prepend(workshop.folder)
    monkeypatch.delitem(sys.modules, "own_plugin_", raising=False)
    group, name = ("hps_numba.tiers", "Tier") if place == "tier" else ("hps_numba.policies", "Policy")
    points = {"own": EntryPoint("own", f"own_plugin_:{name}", group)}
    package = "hps_numba.storage.tiers" if place == "tier" else "hps_numba.kernels.policies"
    monkeypatch.setattr(plugins, "entry_points", lambda asked: points if asked == package else {})
    config = with_tier(workshop, "own") if place == "tier" else config_of(workshop, cache_policy=["own"])
    layer = Query(config, (TableQuery("m", 0, 4),)).to_json()
    with pytest.raises(ConfigError, match=r"'own' is an installed plugin that is not imported yet.* call Init or server_of"):
        answer(layer, [np.arange(4)], servers)
    assert not ran.exists()
    importlib.import_module("own_plugin_")  # by the program
    assert np.array_equal(answer(layer, [np.arange(4)], servers)[0], rows_of(range(4), 4))


def test_a_lent_server_is_found_by_its_name_and_never_built(workshop: Any, servers: Servers) -> None:
    server = workshop.open(workshop.model((range(5), 3)))
    name = servers.lend(server)
    assert servers.lend(server) == name != servers.lend(workshop.open(workshop.model((range(5), 3))))
    assert servers.open(name) is server and servers.of_model(name, "m") is server
    servers.close()
    assert not server.closed and servers.open(name) is server
    server.close()
    for config in (name, "<server 99 of process 1>"):
        with pytest.raises(ClosedError):
            servers.open(config)
