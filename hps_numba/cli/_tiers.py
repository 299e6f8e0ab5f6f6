"""Shared by the commands that work on the tiers of a config: options, and tiers opened one by one, without a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.errors import ConfigError, TierError, TierNotMade, TierUnavailable

if TYPE_CHECKING:
    import numpy as np

    from hps_numba.config import ServerConfig, TableSpec
    from hps_numba.config.databases import AnyTierConfig
    from hps_numba.config.messages import Location
    from hps_numba.storage.tiers._checked import CheckedTier

__all__ = [
    "DUMP_SUFFIXES",
    "AllowCode",
    "Config",
    "ConfiguredTier",
    "TableTag",
    "TierName",
    "chosen_table",
    "chosen_tiers",
    "configured_tiers",
    "done_tiers",
    "fetch_all",
    "is_private",
    "label",
]

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A ps_config JSON file.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Permit the config to name Python code, which is run.")]
TierName = Annotated[str | None, typer.Option("--tier", help="Number (from 0, fastest first), type or place of the tier.")]
TableTag = Annotated[str | None, typer.Option("--table", help="The table: hps_et.MODEL.TABLE, or MODEL/TABLE of the config.")]

DUMP_SUFFIXES = (".bin", ".sst")  # of dumps of databases; a sparse model has any other

_WHERE = {"redis_cluster": "address", "multi_process_hash_map": "shared_memory_name"}
_WHERE_OF_OTHERS = ("path", "folder", "file", "url", "uri", "address", "host", "name")  # options of tiers of other types
_CREDENTIALS = re.compile(r"//[^/@\s]*@")
_HIDDEN = "(hidden)"


@dataclass(frozen=True)
class ConfiguredTier:
    """A tier as a config describes it; not open.

    Attributes:
        number: its position, from 0, fastest first.
        place: location of its section in the config.
    """

    config: ServerConfig
    number: int
    place: Location
    section: AnyTierConfig
    allow_code: bool

    @property
    def name(self) -> str:
        """``volatile_db``, ``persistent_db`` or ``tiers[1]``."""
        from hps_numba.config.messages import dotted

        return dotted(self.place)

    @property
    def key_bits(self) -> int:
        """Width of the keys, 64 or 32."""
        return 64 if self.config.supportlonglong else 32

    @property
    def where(self) -> str:
        """Address, path or name of the segment; empty if the config has none. Never a password."""
        from hps_numba.config import TierConfig

        section = self.section
        if isinstance(section, TierConfig):
            given = {**(section.model_extra or {})}
            return self.public(", ".join(str(given[key]) for key in _WHERE_OF_OTHERS if key in given))
        return self.public(str(getattr(section, _WHERE.get(section.type, "path"), "")))

    def public(self, text: str) -> str:
        """``text`` without the passwords of the tier's section."""
        from hps_numba.config.messages import SECRET_KEYS

        extra = self.section.model_extra or {}
        for key in SECRET_KEYS:
            secret = getattr(self.section, key, None) or extra.get(key)
            if secret:
                text = text.replace(str(secret), _HIDDEN)
        return _CREDENTIALS.sub(f"//{_HIDDEN}@", text)

    @property
    def facts(self) -> dict[str, Any]:
        """Place, type and ``where``, as reports have them."""
        return {"tier": self.name, "type": self.section.type, "where": self.where}

    def skipped(self, why: str) -> dict[str, Any]:
        """The result for a tier that a command leaves out."""
        return {**self.facts, "skipped": f"{self.name} ({self.section.type}): {why}"}

    @contextmanager
    def open(self, *, read_only: bool) -> Iterator[CheckedTier]:
        """Open this tier alone, with its answers checked; ``read_only`` if its type can be opened so.

        Raises:
            TierError: it cannot be opened, or a call in the block fails; the message begins with the place.
            ConfigError: it is not a tier, or an option of it is not valid.
        """
        from hps_numba.device.host_memory import PlainHostAllocator
        from hps_numba.storage.tier_stack import open_tiers
        from hps_numba.storage.tiers._checked import CheckedTier

        with self._errors():
            host, others = open_tiers(self._alone(read_only), PlainHostAllocator(), allow_code=self.allow_code)
            tier = CheckedTier(others.tiers[0] if host is None else host)
            try:
                yield tier
            finally:
                tier.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TierError as problem:
            text = self.public(str(problem))
            kind = next(kind for kind in (TierNotMade, TierUnavailable, TierError) if isinstance(problem, kind))
            raise kind(text if text.startswith(self.name) else f"{self.name}: {text}") from problem

    def _alone(self, read_only: bool) -> ServerConfig:
        """The config with every other tier disabled, so that the places in messages stay as they are."""
        config, section = self.config, self.section
        if read_only and "read_only" in type(section).model_fields:
            section = section.model_copy(update={"read_only": True})
        disabled = {"type": "disabled"}
        if self.place[0] == "tiers":
            tiers = (section if i == self.place[1] else one.model_copy(update=disabled) for i, one in enumerate(config.tiers))
            return config.model_copy(update={"tiers": tuple(tiers)})
        slots = {key: getattr(config, key).model_copy(update=disabled) for key in ("volatile_db", "persistent_db")}
        return config.model_copy(update={**slots, str(self.place[0]): section})


def configured_tiers(config: Path | ServerConfig, *, allow_code: bool) -> list[ConfiguredTier]:
    """All tiers of a config that are not disabled, fastest first.

    Raises:
        ConfigError: the config is not valid, or has no tier.
    """
    from hps_numba.config import read_config

    read = read_config(config)
    found = [ConfiguredTier(read, i, place, section, allow_code) for i, (place, section) in enumerate(read.tier_sections())]
    if not found:
        raise ConfigError(f"{config}: expected a config with a storage tier, got none: every one is disabled")
    return found


def chosen_tiers(tiers: list[ConfiguredTier], name: str | None, option: str = "--tier") -> list[ConfiguredTier]:
    """The tiers of that number, place or type; all of them for None.

    Raises:
        typer.BadParameter: there is none.
    """
    if name is None:
        return tiers
    chosen = [tier for tier in tiers if name in (str(tier.number), tier.name, tier.section.type)]
    if not chosen:
        known = ", ".join(f"{tier.number} ({tier.name}, {tier.section.type})" for tier in tiers)
        raise typer.BadParameter(f"expected one of {known}, got {name!r}", param_hint=option)
    return chosen


def chosen_table(config: ServerConfig, name: str) -> tuple[str, TableSpec | None]:
    """The tag of a table, and the table if the config has it.

    Raises:
        typer.BadParameter: neither a tag nor MODEL/TABLE of the config.
    """
    for spec in config.tables():
        if name in (spec.tag, f"{spec.model}/{spec.name}"):
            return spec.tag, spec
    if name.startswith("hps_et.") and name.count(".") > 1:
        return name, None
    known = ", ".join(spec.tag for spec in config.tables())
    raise typer.BadParameter(
        f"expected hps_et.MODEL.TABLE, or a table of the config ({known}), got {name!r}", param_hint="--table"
    )


def is_private(tier: CheckedTier) -> bool:
    """Whether the rows of a tier are in the memory of one process: a command finds none, and would lose what it writes."""
    return not (tier.inner.shared or tier.inner.persistent)


def fetch_all(tier: CheckedTier, table: str, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``Tier.fetch`` of keys that must all be looked for; bool ``[n]``, which of them have a row.

    Raises:
        TierError: also if only a part of the tier is out of order.
    """
    answer = tier.fetch(table, keys, rows)
    answer.check_complete(table)
    return answer.found


def label(facts: dict[str, Any]) -> str:
    """Type and place of a tier, for people."""
    return f"{facts['type']} at {facts['where']}" if facts["where"] else str(facts["type"])


def done_tiers(results: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The results of those tiers that were not left out; says on stderr which were, and why.

    Raises:
        ConfigError: all of them were.
    """
    done = [one for one in results if "skipped" not in one]
    skipped = [one["skipped"] for one in results if "skipped" in one]
    if not done:
        raise ConfigError(f"expected a tier to {what}, got none: {'; '.join(skipped)}")
    for line in skipped:
        typer.echo(f"left out: {line}", err=True)
    return done
