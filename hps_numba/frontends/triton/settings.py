"""What a ``config.pbtxt`` tells its model, in ``parameters``: text by name."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps_numba.config.messages import show
from hps_numba.errors import ConfigError

__all__ = ["Settings", "parameters_of"]

log = logging.getLogger(__name__)
_MAX_SECONDS = 3.2e7  # a year


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the model of one Triton instance is opened.

    Attributes:
        ps: the ps_config file.   model: which of its models; Triton may call it otherwise.
        refresh_interval, refresh_delay: seconds, instead of those of the config; None: those of the config.
        freeze_sparse: rows that tiers beyond this process have already stay as they are.
        allow_code: the config may name Python code, such as tiers of the user's own.
        metrics_interval: seconds between two reports to Triton's metrics; 0: none.
    """

    ps: Path
    model: str
    refresh_interval: float | None = None
    refresh_delay: float | None = None
    freeze_sparse: bool = False
    allow_code: bool = False
    metrics_interval: float = 1.0

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, str]) -> Settings:
        """From what Triton hands to ``initialize``.

        A relative ``ps`` is looked up in the folder of the model, the one with its ``config.pbtxt``. Unknown parameters are
        logged as a WARNING.

        Raises:
            ConfigError: a parameter is missing or not valid.
        """
        given = parameters_of(arguments)
        if not given.get("ps"):
            raise ConfigError("parameters.ps: expected the path of a ps_config file, got none")
        _warn_of_unknown(given)
        return cls(
            ps=Path(arguments.get("model_repository", "")) / given["ps"],
            model=given.get("model") or arguments["model_name"],
            refresh_interval=_seconds(given, "refresh_interval"),
            refresh_delay=_seconds(given, "refresh_delay"),
            freeze_sparse=_flag(given, "freeze_sparse"),
            allow_code=_flag(given, "allow_code"),
            metrics_interval=_seconds(given, "metrics_interval", 1.0),
        )


def parameters_of(arguments: Mapping[str, str]) -> dict[str, str]:
    """``parameters`` of a ``config.pbtxt``, from what Triton hands to ``initialize``."""
    config: dict[str, Any] = json.loads(arguments["model_config"])
    return {name: str(value.get("string_value", "")) for name, value in config.get("parameters", {}).items()}


def _seconds(given: Mapping[str, str], name: str, default: Any = None) -> Any:
    if name not in given:
        return default
    try:
        seconds = float(given[name])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ConfigError(f"parameters.{name}: expected seconds from 0 to {_MAX_SECONDS:g}, got {show(given[name])}")
    return seconds


def _flag(given: Mapping[str, str], name: str) -> bool:
    word = given.get(name, "false").strip().lower()
    if word not in ("true", "false", "1", "0"):
        raise ConfigError(f"parameters.{name}: expected true or false, got {show(given[name])}")
    return word in ("true", "1")


def _warn_of_unknown(given: Mapping[str, str]) -> None:
    known = list(Settings.__dataclass_fields__)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            log.warning("parameters.%s: without effect%s", show(name), hint)
