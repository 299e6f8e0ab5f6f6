"""Options that a tier declares itself, and tiers as a list: the same checks, paths and warnings as for every other key."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator
from support.configs import MINIMAL, logged, refused

from hps_numba.config import (
    ServerConfig,
    TierConfig,
    UpdateSourceConfig,
    VolatileDatabaseConfig,
    checked_options,
    read_config,
)
from hps_numba.errors import ConfigError


@dataclass
class Plain:
    my_option: int
    path: Path = Path("x")
    names: list[str] = field(default_factory=list)
    limit: float | None = None


class Checked(BaseModel):
    my_option: Annotated[int, Field(ge=1, le=9)] = 5
    rate: Annotated[float, Field(gt=0)] = 1.0
    mode: Literal["fast", "safe"] = "fast"

    @field_validator("mode")
    @classmethod
    def no_safe_mode(cls, mode: str) -> str:
        if mode == "safe":
            raise ValueError("there is no safe mode yet")
        return mode


def options_of(options: type | None, *, strict: bool = False, **keys: Any) -> Any:
    """What a tier with ``options`` gets from ``persistent_db``."""
    config = read_config({**MINIMAL, "persistent_db": {"type": "my_package:Tier", **keys}})
    return checked_options(config.persistent_db, options, ("persistent_db",), strict=strict)


def test_options_become_an_instance_of_their_class() -> None:
    section = options_of(Plain, my_option=3, path="/data", names=["a", "b"], read_only=True)
    assert section.options == Plain(3, Path("/data"), ["a", "b"])
    assert (section.read_only, section.type) == (True, "my_package:Tier")
    assert options_of(Checked, my_option=9).options == Checked(my_option=9)
    assert options_of(None).options is None


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        (Plain, {"my_option": "x"}, "persistent_db.my_option: expected an integer, got 'x'"),
        (Plain, {}, "persistent_db.my_option: missing, expected an integer"),
        (Plain, {"my_option": True}, "persistent_db.my_option: expected an integer, got true"),
        (Plain, {"my_option": 1, "names": ["a", 2]}, "persistent_db.names[1]: expected a string, got 2"),
        (Plain, {"my_option": 1, "names": "a"}, "persistent_db.names: expected a list, each entry a string, got 'a'"),
        (Plain, {"my_option": 1, "limit": "x"}, "persistent_db.limit: expected a number or null, got 'x'"),
        (Checked, {"my_option": 10}, "persistent_db.my_option: 10 is not in 1..9"),
        (Checked, {"my_option": 1.5}, "persistent_db.my_option: expected an integer in 1..9, got 1.5"),
        (Checked, {"rate": 0}, "persistent_db.rate: expected a number above 0, got 0"),
        (Checked, {"mode": "quick"}, "persistent_db.mode: expected 'fast' or 'safe', got 'quick'"),
        (Checked, {"mode": "safe"}, "persistent_db.mode: 'safe' is not valid: there is no safe mode yet"),
    ],
)
def test_a_wrong_option_names_its_path(options: type, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options_of(options, **keys)
    assert str(caught.value) == message


def test_an_unknown_option_is_warned_about_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    line = "persistent_db.my_optoin: unknown key, did you mean 'my_option'?"
    assert options_of(Checked, my_optoin=3).options == Checked()
    assert logged(caplog, logging.WARNING) == [line]
    with pytest.raises(ConfigError) as caught:
        options_of(Checked, my_optoin=3, strict=True)
    assert str(caught.value) == line


def test_a_tier_without_options_knows_only_the_keys_of_every_tier(caplog: pytest.LogCaptureFixture) -> None:
    assert options_of(None, read_onyl=True).options is None
    assert logged(caplog, logging.WARNING) == ["persistent_db.read_onyl: unknown key, did you mean 'read_only'?"]


def test_all_problems_of_a_section_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        options_of(Checked, my_option=0, rate=-1, other=1, strict=True)
    assert caught.value.problems == (
        "persistent_db.other: unknown key",
        "persistent_db.my_option: 0 is not in 1..9",
        "persistent_db.rate: expected a number above 0, got -1",
    )


def test_the_config_remembers_whether_unknown_keys_are_errors() -> None:
    assert not read_config(MINIMAL).strict
    assert read_config(MINIMAL, strict=True).strict


def test_options_are_part_of_the_config_and_of_its_identity() -> None:
    def config(**keys: Any) -> ServerConfig:
        return read_config({**MINIMAL, "persistent_db": {"type": "my_package:Tier", **keys}})

    assert config(a=1) == read_config(config(a=1).to_dict()) != config(a=2)
    assert config(a=1).identity != config(a=2).identity
    assert refused({**MINIMAL, "persistent_db": {"type": "a:B", "x": object()}}).startswith(
        "persistent_db.x: expected a value that JSON has"
    )


def test_keys_of_hugectrs_own_types_are_checked_when_the_config_is_read(caplog: pytest.LogCaptureFixture) -> None:
    read_config({**MINIMAL, "volatile_db": {"type": "hash_map", "nun_partitions": 3}})
    assert logged(caplog, logging.WARNING) == ["volatile_db.nun_partitions: unknown key, did you mean 'num_partitions'?"]


# --- tiers ------------------------------------------------------------------------------------------------------------

TIERS = [
    {"type": "hash_map", "num_partitions": 2},
    {"type": "my_package:Tier", "my_option": 3},
    {"type": "rocks_db", "path": "/d"},
]


def test_tiers_are_a_list_of_sections_fastest_first() -> None:
    config = read_config({**MINIMAL, "tiers": TIERS})
    assert [(place, section.type) for place, section in config.tier_sections()] == [
        (("tiers", 0), "hash_map"),
        (("tiers", 1), "my_package:Tier"),
        (("tiers", 2), "rocks_db"),
    ]
    assert config.volatile_db is config.tiers[0]
    assert config == read_config(config.to_dict())
    assert "tiers" in config.to_dict() and "volatile_db" not in config.to_dict()
    assert "tiers" not in read_config(MINIMAL).to_dict()


def test_the_two_slots_are_two_tiers() -> None:
    config = read_config({**MINIMAL, "volatile_db": {"type": "hash_map"}, "persistent_db": {"type": "rocks_db"}})
    assert [place for place, _ in config.tier_sections()] == [("volatile_db",), ("persistent_db",)]
    assert read_config({**MINIMAL, "volatile_db": {"type": "disabled"}}).tier_sections() == ()


def test_a_list_without_a_database_in_memory_has_no_volatile_db() -> None:
    assert read_config({**MINIMAL, "tiers": [{"type": "my_package:Tier"}]}).volatile_db.type == "disabled"


@pytest.mark.parametrize("slots", [["volatile_db"], ["persistent_db"], ["volatile_db", "persistent_db"]])
def test_tiers_and_slots_cannot_be_mixed(slots: list[str]) -> None:
    message = refused({**MINIMAL, "tiers": TIERS, **{slot: {"type": "disabled"} for slot in slots}})
    assert message == f"tiers: expected either tiers or volatile_db and persistent_db, got tiers and {' and '.join(slots)}"


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([], "tiers: expected at least 1 entry, got []"),
        ({}, "tiers: expected a list"),
        ([3], "tiers[0]: expected an object, got 3"),
        ([{}], "tiers[0].type: missing, expected a string"),
        ([{"type": "hash_mpa"}], "tiers[0].type: expected one of disabled, "),
        ([TIERS[0], {"type": "my package"}], "tiers[1].type: expected one of disabled, "),
        ([TIERS[0], {"type": "a b:C"}], "tiers[1].type: expected package.module:NAME or path/to/file.py:NAME, got 'a b:C'"),
        ([{"type": "hash_map", "num_partitions": 0}], "tiers[0].num_partitions: 0 is not in 1..65536"),
        ([{"type": "rocks", "num_threads": "x"}], "tiers[0].num_threads: expected an integer in 1..1024, got 'x'"),
        ([{"type": "a:B", "max_batch_size": 0}], "tiers[0].max_batch_size: 0 is not in 1..2147483647"),
        ([{"type": "hash_map", "allocation_rate": 4}], "tiers[0].allocation_rate: 4 is less than the 64 bytes of a row of"),
    ],
)
def test_a_wrong_tier_names_its_path(tiers: Any, message: str) -> None:
    assert refused({**MINIMAL, "tiers": tiers}).startswith(message)


def test_unknown_keys_of_a_listed_tier(caplog: pytest.LogCaptureFixture) -> None:
    read_config({**MINIMAL, "tiers": [{"type": "hash_map", "adress": "a"}, {"type": "my_package:Tier", "anything": 1}]})
    assert logged(caplog, logging.WARNING) == ["tiers[0].adress: unknown key, did you mean 'address'?"]


# --- options that are a section, or no class at all -------------------------------------------------------------------


def section_for(options: Any, *, strict: bool = False, **keys: Any) -> Any:
    """What a tier with ``options`` in place of ``volatile_db`` gets."""
    config = read_config({**MINIMAL, "volatile_db": {"type": "my_package:Tier", **keys}})
    return checked_options(config.volatile_db, options, ("volatile_db",), strict=strict)


def test_unknown_keys_are_found_where_the_section_itself_is_the_options(caplog: pytest.LogCaptureFixture) -> None:
    line = "volatile_db.num_partitons: unknown key, did you mean 'num_partitions'?"
    assert section_for(VolatileDatabaseConfig, num_partitons=3).num_partitions != 3
    assert logged(caplog, logging.WARNING) == [line]
    with pytest.raises(ConfigError) as caught:
        section_for(VolatileDatabaseConfig, num_partitons=3, strict=True)
    assert str(caught.value) == line


def test_a_key_of_the_section_that_its_replacement_lacks_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    section = options_of(VolatileDatabaseConfig, read_only=True, num_partitions=3)
    assert (type(section), section.num_partitions) == (VolatileDatabaseConfig, 3)
    assert logged(caplog, logging.WARNING) == ["persistent_db.read_only: unknown key"]
    with pytest.raises(ConfigError, match=r"^persistent_db\.read_only: unknown key$"):
        options_of(VolatileDatabaseConfig, read_only=True, strict=True)
    assert options_of(VolatileDatabaseConfig, read_only=False, strict=True).type == "my_package:Tier"


def test_derived_defaults_are_not_options() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")

    section = section_for(Open, num_partitions=2, mine=1)
    assert section.num_node_connections == 2
    assert section.options.model_dump() == {"type": "my_package:Tier", "num_partitions": 2, "mine": 1}


class NoDataclass:
    pass


@dataclass
class Uncheckable:
    nested: NoDataclass | None = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": 1}, "Options of 'my_package:Tier': expected a dataclass or pydantic model, got {'a': 1}"),
        (NoDataclass, "Options of 'my_package:Tier': cannot be checked: Unable to generate"),
        (Uncheckable, "Options of 'my_package:Tier': cannot be checked: Unable to generate"),
    ],
)
def test_options_that_cannot_be_checked_are_a_config_error(options: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section_for(options, a=1)
    assert str(caught.value).startswith(f"volatile_db.type: {message}")


@pytest.mark.parametrize("kind", ["redis", "my_package:Tier"])
def test_no_password_is_in_the_repr_of_a_config(kind: str) -> None:
    for keys in ({"volatile_db": {"type": kind, "password": "s3cret"}}, {"tiers": [{"type": kind, "password": "s3cret"}]}):
        config = read_config({**MINIMAL, **keys})
        assert "s3cret" not in repr(config) + str(config)
        assert config.tier_sections()[0][1].model_dump()["password"] == "s3cret"


def test_hugectrs_types_of_tiers_are_no_types_of_sources() -> None:
    assert UpdateSourceConfig.leaves_keys_to_plugin("redis") and not UpdateSourceConfig.leaves_keys_to_plugin("none")
    assert TierConfig.leaves_keys_to_plugin("kafka") and not TierConfig.leaves_keys_to_plugin("redis")
