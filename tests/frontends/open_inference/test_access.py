"""Tokens: which are taken, and where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from hps_numba.errors import ConfigError
from hps_numba.frontends.open_inference.access import TOKEN_VARIABLE, Access, read_tokens

FIRST, SECOND = "a-token-of-some-length", "another-token-of-some-length"


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (f"Bearer {FIRST}", True),
        (f"bearer {SECOND}", True),
        (f"Bearer  {FIRST} ", True),
        (None, False),
        ("", False),
        ("Bearer ", False),
        (FIRST, False),
        (f"Basic {FIRST}", False),
        (f"Bearer {FIRST[:-1]}", False),
        (f"Bearer {FIRST}x", False),
        ("Bearer \xff", False),
    ],
)
def test_bearers(header: str | None, allowed: bool) -> None:
    access = Access([FIRST, SECOND])
    assert access.restricted
    assert access.allows(None if header is None else header.encode("latin-1")) is allowed


def test_without_tokens_everybody_may_ask() -> None:
    assert not Access().restricted and Access().allows(None) and Access().allows(b"Bearer x")


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_tokens(None) == ()
    monkeypatch.setenv(TOKEN_VARIABLE, FIRST)
    assert read_tokens(None) == (FIRST,)
    path = tmp_path / "tokens"
    path.write_text(f"{FIRST}\n\n  {SECOND}\r\n")
    assert read_tokens(path) == (FIRST, SECOND)


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "empty file"), ("short", "got one of 5"), ("with a blank in between", "plain"), ("ü" * 20, "plain")],
)
def test_what_is_no_token(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match) as refused:
        read_tokens(path)
    assert not text or text not in str(refused.value).removeprefix(str(path))
