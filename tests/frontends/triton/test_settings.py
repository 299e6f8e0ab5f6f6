"""Parameters of a config.pbtxt: read, checked, and told if they do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.played_triton import arguments

from hps_numba.errors import ConfigError
from hps_numba.frontends.triton.settings import Settings

SECONDS = "expected seconds from 0 to 3.2e+07"


def test_all_parameters() -> None:
    given = {
        "refresh_interval": "2.5",
        "refresh_delay": "0",
        "freeze_sparse": "True",
        "allow_code": "1",
        "metrics_interval": "0",
    }
    settings = Settings.from_arguments(arguments("shown", "/models/shown", ps="/a/ps.json", model="m", **given))
    assert settings == Settings(
        ps=Path("/a/ps.json"),
        model="m",
        refresh_interval=2.5,
        refresh_delay=0.0,
        freeze_sparse=True,
        allow_code=True,
        metrics_interval=0.0,
    )


def test_defaults(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_arguments(arguments("m", "/models/m", ps="../ps.json"))
    assert settings == Settings(ps=Path("/models/m/../ps.json"), model="m")
    assert (settings.refresh_interval, settings.freeze_sparse) == (None, False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "parameters.ps: expected the path of a ps_config file, got none"),
        ({"ps": ""}, "parameters.ps: expected the path of a ps_config file, got none"),
        (
            {"ps": "x", "refresh_interval": "often"},
            f"parameters.refresh_interval: {SECONDS}, got 'often'",
        ),
        ({"ps": "x", "refresh_delay": "-1"}, f"parameters.refresh_delay: {SECONDS}, got '-1'"),
        ({"ps": "x", "refresh_delay": "nan"}, f"parameters.refresh_delay: {SECONDS}, got 'nan'"),
        ({"ps": "x", "freeze_sparse": "yes"}, "parameters.freeze_sparse: expected true or false, got 'yes'"),
    ],
)
def test_what_is_not_valid_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_arguments(arguments(**parameters))
    assert str(caught.value) == message


def test_an_unknown_parameter_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Settings.from_arguments(arguments(ps="x", refresh_intervall="3"))
    assert [record.getMessage() for record in caplog.records] == [
        "parameters.'refresh_intervall': without effect, did you mean refresh_interval?"
    ]
