"""``update_source`` and ``update_sources``: two forms of one thing, with options that the source checks itself."""

from __future__ import annotations

from typing import Any

import pytest
from support.configs import MINIMAL, TWO_MODELS, changed, logged, refused

from hps_numba.config import read_config

WARNING = 30


def test_a_list_of_sources_is_read_and_written_again() -> None:
    sources = [{"type": "kafka_mq", "brokers": "a:1", "name": "one"}, {"type": "my_package:Source", "own": [1, 2]}]
    config = read_config({**MINIMAL, "update_sources": sources})
    assert [(place, section.type) for place, section in config.source_sections()] == [
        (("update_sources", 0), "kafka_message_queue"),
        (("update_sources", 1), "my_package:Source"),
    ]
    form = config.to_dict()
    assert "update_source" not in form
    assert form["update_sources"][1]["own"] == [1, 2]
    assert read_config(form) == config != read_config(MINIMAL)


def test_one_source_is_a_list_of_one() -> None:
    config = read_config(TWO_MODELS)
    assert [(place, section.brokers) for place, section in config.source_sections()] == [
        (("update_source",), "kafka0:9092,kafka1:9092")
    ]
    assert "update_sources" not in config.to_dict()
    assert read_config(MINIMAL).source_sections() == ()


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"update_sources": [{"type": "kafka"}], "update_source": {}}, "update_sources: expected either update_sources or"),
        ({"update_sources": []}, "update_sources: expected at least 1 entry, got []"),
        ({"update_sources": [{"type": "kafka", "name": "a"}] * 2}, "update_sources[1].name: 'a' is already"),
        ({"update_sources": [{"type": "kafkka"}]}, "update_sources[0].type: expected one of "),
        ({"update_sources": [{"type": "kafka", "poll_timeout_ms": 0}]}, "update_sources[0].poll_timeout_ms: 0 is not in 1.."),
        (
            {"update_source": {"type": "kafka", "start": "newest"}},
            "update_source.start: expected one of auto, committed, oldest",
        ),
        ({"update_source": {"type": "kafka", "max_backlog_bytes": 1}}, "update_source.max_backlog_bytes: 1 is not in 65536.."),
        ({"update_source": {"type": "kafka", "name": "a b"}}, "update_source.name: expected at most 120 of the characters"),
        ({"update_source": {"type": "kafka", "own": float("nan")}}, "update_source.own: "),
    ],
)
def test_what_is_wrong_is_said_with_its_place(top: dict[str, Any], message: str) -> None:
    assert refused({**MINIMAL, **top}).startswith(message)


def test_several_sources_without_a_name_are_fine() -> None:
    assert len(read_config({**MINIMAL, "update_sources": [{"type": "kafka"}] * 3}).source_sections()) == 3


def test_numbers_as_text_are_read_in_the_list_too(caplog: pytest.LogCaptureFixture) -> None:
    config = read_config({**MINIMAL, "update_sources": [{"type": "kafka", "poll_timeout_ms": "700"}]})
    assert config.update_sources[0].poll_timeout_ms == 700
    assert logged(caplog, WARNING) == ["update_sources[0].poll_timeout_ms: expected 700, got '700', read as 700"]


def test_unknown_keys_of_no_source_are_warned_about_and_those_of_a_source_are_left_to_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_config(changed(MINIMAL, "update_source", {"zzz": 1}))
    assert logged(caplog, WARNING) == ["update_source.zzz: unknown key"]
    caplog.clear()
    config = read_config(changed(TWO_MODELS, "update_source.security_protocol", "SSL"), strict=True)
    assert config.update_source.unknown({"security_protocol"}) == []
    assert logged(caplog, WARNING) == []
