"""``hps-numba publish``: sends a sparse model, or what changed since an older one, to the servers that read a bus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli._output import AsJson, human_rate, human_seconds, print_json
from hps_numba.cli._tiers import AllowCode, chosen_table

if TYPE_CHECKING:
    from hps_numba.cli._publish_target import Target
    from hps_numba.config import ServerConfig
    from hps_numba.storage.urls import Place
    from hps_numba.updates import UpdateProducer

__all__ = ["PLUGIN"]

_ERASED_AT_ONCE = 1 << 20


def publish(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A sparse model of any format: a directory, a file or a URL.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="CONFIG|URL",
            help="A ps_config JSON file with an update_source, or files://FOLDER, redis://HOST:PORT/STREAM, kafka://BROKERS.",
        ),
    ],
    since: Annotated[
        str | None, typer.Option(metavar="OLD", help="Send what changed since this model, and deletions of keys that are gone.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="The table: hps_et.MODEL.TABLE, or MODEL/TABLE of the config; by default MODEL's.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Name, type or place of the source of the config, if it has several.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the model, for the servers' statistics.")
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Expected width of MODEL.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Key of the producer; may be given several times.")
    ] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Send a sparse model, or what changed since an older one, to every server that reads a bus.

    It is done when the bus has everything. An interrupted command is repeated: rows that were sent twice do no harm. Rows of a
    whole model are streamed; with --since, keys are compared in shares that take about 1 GiB.
    """
    from hps_numba.cli._publish_target import target_of
    from hps_numba.storage.urls import place_of

    place, old = place_of(model, "MODEL"), None if since is None else place_of(since, "--since")
    target = target_of(to, source, settings or [], allow_code=allow_code)
    tag, expected = _table(target.config, table, model)
    if dim is not None and expected not in (None, dim):
        raise typer.BadParameter(f"expected {expected}, the width of {tag} in the config, got {dim}", param_hint="--dim")
    started = time.perf_counter()
    counts = _send(target, tag, place, old, dim or expected, version, allow_code)
    seconds = time.perf_counter() - started
    report = {"model": model, "since": since, "to": target.text, "table": tag, **counts, "seconds": seconds}
    if as_json:
        print_json(report)
    else:
        _show(report)


PLUGIN = publish


def _table(config: ServerConfig | None, name: str | None, model: str) -> tuple[str, int | None]:
    """Tag and, if it is known, width of the table."""
    from hps_numba.storage.urls import place_of

    if config is None:
        if name is None or name.count(".") != 2 or not name.startswith("hps_et."):
            raise typer.BadParameter(f"expected hps_et.MODEL.TABLE with a URL, got {name!r}", param_hint="--table")
        return name, None
    if name is not None:
        tag, spec = chosen_table(config, name)
        return tag, None if spec is None else spec.dim
    mine = _absolute(place_of(model, "MODEL"))
    found = [spec for spec in config.tables() if _absolute(place_of(str(spec.source), "sparse_files")) == mine]
    if len(found) == 1:
        return found[0].tag, found[0].dim
    known = ", ".join(spec.tag for spec in found or config.tables())
    raise typer.BadParameter(
        f"expected one of {known}: {model} is the sparse file of {len(found)} tables", param_hint="--table"
    )


def _absolute(place: Place) -> str:
    from pathlib import Path

    return str(place.resolve()) if isinstance(place, Path) else str(place)


def _send(
    target: Target, tag: str, model: Place, old: Place | None, dim: int | None, version: int | None, allow_code: bool
) -> dict[str, int]:
    """Publish; how many rows and deletions, and how many rows are as they were."""
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.storage.model_files import open_model
    from hps_numba.updates import open_producer

    key_bits = target.section.get("key_bits", 64)
    rows = 0
    for place in (model,) if old is None else (model, old):
        with open_model(place, dim) as reader:
            rows += reader.rows
    _, name, table = tag.split(".", 2)
    with open_producer(target.section, allow_code=allow_code) as producer, rows_progress(rows, doing="publishing") as advance:
        sender = _Sender(producer, name, table, version)
        if old is None:
            _send_whole(sender, model, dim, key_bits, lambda n: advance(tag, n))
        else:
            _send_difference(sender, old, model, dim, key_bits, lambda n: advance(tag, n))
        producer.flush()
    return {"rows": sender.rows, "erased": sender.erased, "unchanged": sender.unchanged}


class _Sender:
    """Publishes to one table, and counts.

    Attributes:
        rows, erased, unchanged: counts.
    """

    def __init__(self, producer: UpdateProducer, model: str, table: str, version: int | None) -> None:
        self._producer, self._model, self._table, self._version = producer, model, table, version
        self.rows = self.erased = self.unchanged = 0

    def update(self, keys: Any, rows: Any) -> None:
        self._producer.update(self._model, self._table, keys, rows, version=self._version)
        self.rows += len(keys)

    def erase(self, keys: Any) -> None:
        for start in range(0, len(keys), _ERASED_AT_ONCE):
            self._producer.erase(self._model, self._table, keys[start : start + _ERASED_AT_ONCE], version=self._version)
        self.erased += len(keys)


def _send_whole(sender: _Sender, model: Place, dim: int | None, key_bits: int, on_rows: Callable[[int], None]) -> None:
    from hps_numba.storage.loading import stream_table
    from hps_numba.storage.model_files import open_model

    with open_model(model, dim) as reader:
        for keys, rows in stream_table(reader, reader.rows, key_bits=key_bits):
            sender.update(keys, rows)
            on_rows(len(keys))


def _send_difference(
    sender: _Sender, old: Place, new: Place, dim: int | None, key_bits: int, on_rows: Callable[[int], None]
) -> None:
    from hps_numba.cli._publish_difference import differences

    for one in differences(old, new, dim, key_bits=key_bits, on_rows=on_rows):
        sender.update(one.keys, one.rows)
        sender.erase(one.gone)
        sender.unchanged += one.unchanged


def _show(report: dict[str, Any]) -> None:
    rate = human_rate((report["rows"] + report["erased"]) / max(report["seconds"], 1e-9), "rows/s")
    counts = f"{report['rows']:,} rows and {report['erased']:,} deletions published"
    same = f", {report['unchanged']:,} rows unchanged" if report["since"] is not None else ""
    typer.echo(f"{report['to']}: {report['table']}: {counts}{same}, in {human_seconds(report['seconds'])}, {rate}")
