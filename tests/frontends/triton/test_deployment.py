"""One model of a config in a process: which, with which timers, and what a load does to rows that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, new_name

from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.frontends.triton.deployment import config_of, lasting_tiers, open_server
from hps_numba.frontends.triton.settings import Settings
from hps_numba.server.hps import HPS

KEYS = np.arange(9)


def write(workshop: Workshop, *models: dict[str, Any], **top: Any) -> Path:
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": models, **top}))
    return path


def opened(workshop: Workshop, path: Path, **more: Any) -> HPS:
    server = open_server(Settings(ps=path, model="m", **more))
    workshop.servers.append(server)
    return server


def shared(name: str | None = None) -> dict[str, Any]:
    return {"type": "multi_process_hash_map", "shared_memory_name": name or new_name(), "shared_memory_size": 16 * MIB}


def test_only_the_one_model_with_its_timers(workshop: Workshop) -> None:
    path = write(workshop, workshop.model((KEYS, 3)), workshop.model((KEYS, 3), name="other", refresh_interval=9))
    config = config_of(Settings(ps=path, model="other", refresh_delay=2.0))
    assert [model.model for model in config.models] == ["other"]
    assert (config.models[0].refresh_interval, config.models[0].refresh_delay) == (9.0, 2.0)
    assert config_of(Settings(ps=path, model="other", refresh_interval=0.5)).models[0].refresh_interval == 0.5
    assert config.folder == workshop.folder
    assert opened(workshop, path).models == ("m",)


def test_a_model_that_the_config_lacks(workshop: Workshop) -> None:
    path = write(workshop, workshop.model((KEYS, 3)))
    with pytest.raises(UnknownModelError, match=r"^parameters.model: expected one of m \(of .*ps.json\), got 'x'$"):
        config_of(Settings(ps=path, model="x"))
    with pytest.raises(ConfigError, match=r"absent\.json"):
        config_of(Settings(ps=workshop.folder / "absent.json", model="m"))


def test_which_tiers_outlive_a_process(workshop: Workshop) -> None:
    def places(**top: Any) -> list[Any]:
        return lasting_tiers(
            config_of(Settings(ps=write(workshop, workshop.model((KEYS, 3)), **top), model="m")), allow_code=True
        )

    assert places() == []
    assert places(volatile_db=shared()) == [("volatile_db",)]
    row_log = {"type": "row_log", "path": str(workshop.folder / "log")}
    assert places(tiers=[{"type": "hash_map"}, row_log]) == [("tiers", 1)]
    assert places(tiers=[{"type": "hash_map"}, {"type": "support.fakes:CountedDictTier"}]) == []


def test_another_load_replaces_shared_rows_if_files_changed(workshop: Workshop) -> None:
    path = write(workshop, workshop.model((KEYS, 3)), volatile_db=shared())
    first = opened(workshop, path)
    first.insert([1], np.full((1, 3), 5), "m", 0)
    same = opened(workshop, path)
    assert_same_bits(same.lookup([1], "m", 0), np.full((1, 3), 5, np.float32))  # the same files: the rows that are there
    workshop.table("m_0.model", KEYS + 4, 3, stamp=1)
    second = opened(workshop, path)
    for server in (first, same, second):
        assert_same_bits(server.lookup(KEYS + 4, "m", 0), rows_of(KEYS + 4, 3, 1))
        assert_same_bits(server.lookup([1], "m", 0), np.full((1, 3), -7.5, np.float32))


def test_freeze_sparse_keeps_shared_rows(workshop: Workshop) -> None:
    path = write(workshop, workshop.model((KEYS, 3)), volatile_db=shared())
    first = opened(workshop, path, freeze_sparse=True)  # nothing is there: it loads
    assert_same_bits(first.lookup(KEYS, "m", 0), rows_of(KEYS, 3))
    workshop.table("m_0.model", KEYS, 3, stamp=1)
    frozen = opened(workshop, path, freeze_sparse=True)
    for server in (first, frozen):
        assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, 3))


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze_sparse_keeps_rows_of_a_slower_tier(workshop: Workshop, freeze: bool) -> None:
    log = {"type": "row_log", "path": str(workshop.folder / "log")}
    path = write(workshop, workshop.model((KEYS, 3)), tiers=[log])
    with open_server(Settings(ps=path, model="m", freeze_sparse=freeze)) as first:
        assert_same_bits(first.lookup(KEYS, "m", 0), rows_of(KEYS, 3))
        first.update([2], np.full((1, 3), 5), "m", 0)
    with open_server(Settings(ps=path, model="m", freeze_sparse=freeze)) as second:
        expected = np.full((1, 3), 5, np.float32) if freeze else rows_of([2], 3)
        assert_same_bits(second.lookup([2], "m", 0), expected)


def test_freeze_sparse_without_such_a_tier_is_a_warning(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    path = write(workshop, workshop.model((KEYS, 3)))
    assert_same_bits(opened(workshop, path, freeze_sparse=True).lookup(KEYS, "m", 0), rows_of(KEYS, 3))
    assert "freeze_sparse: without effect, no tier of the config outlives a process" in caplog.text


def test_looking_whether_rows_are_there_takes_no_updates(workshop: Workshop) -> None:
    """Positions of a source must not be committed by a server that is closed at once."""
    bus = workshop.folder / "bus"
    update_source = {"type": "files", "folder": str(bus)}
    path = write(workshop, workshop.model((KEYS, 3)), volatile_db=shared(), update_source=update_source)
    first = opened(workshop, path)
    assert first.update_stats()
    frozen = opened(workshop, path, freeze_sparse=True)
    assert_same_bits(frozen.lookup(KEYS, "m", 0), rows_of(KEYS, 3))
