"""``hps-numba top``: a live view of the metrics of a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hps_numba.cli._live import Interval, Once, Seconds, shown, ticks, until_interrupted
from hps_numba.cli._output import AsJson, console, print_json
from hps_numba.cli._tiers import AllowCode
from hps_numba.cli._top_samples import Change, Samples, read_samples
from hps_numba.cli._top_scrape import Scraper, is_url
from hps_numba.cli._top_view import look, view
from hps_numba.errors import HpsError

__all__ = ["PLUGIN"]

_WITH_MODELS = ("hps_model_version", "hps_lookups_total")  # metrics that each model has
Target = Annotated[str, typer.Argument(metavar="URL|CONFIG", help="http://HOST:PORT of a server, or a ps_config JSON file.")]


def top(
    target: Target,
    interval: Interval = 1.0,
    seconds: Seconds = None,
    model: Annotated[str | None, typer.Option(help="Show this model only.")] = None,
    once: Once = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what a server does, by model and table: lookups, hit rates by tier, evictions, latencies, updates, queues, bytes.

    With a URL, the metrics of a running server are read (http://HOST:PORT means its /metrics; the token in HPS_NUMBA_TOKEN is
    sent if there is one). With a config, this process serves it, with its update sources, and shows what they do: it is a
    server of its own and sees nothing of another one. Rates and latencies are of the last interval. With --json, each look is
    a line.
    """
    with _metrics_of(target, allow_code) as (place, read):
        looks = _Looks(place, read)
        _check_model(model, looks.models)
        if once:
            for _ in ticks(interval, interval):
                found = look(looks.next(), model)
                print_json(found) if as_json else console().print(view(found))
            return
        with until_interrupted(), shown(None if as_json else view) as show:
            for _ in ticks(interval, seconds):
                show(_look_or_problem(looks, model))


PLUGIN = top


@contextmanager
def _metrics_of(target: str, allow_code: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """What errors call a server, and what gives the text of its metrics."""
    if is_url(target):
        scraper = Scraper(target)
        yield scraper.url, scraper.read
        return
    import hps_numba

    with hps_numba.HPS(Path(target), allow_code=allow_code) as server:
        yield target, server.metrics_text


class _Looks:
    """Looks at one server, each compared with the one before; the first is taken at once.

    Raises:
        HpsError, also in ``next``: there are no metrics.
    """

    def __init__(self, place: str, read: Callable[[], str]) -> None:
        self._place, self._read = place, read
        self._last = self._take()

    @property
    def models(self) -> list[str]:
        """Names of the models that the last look found."""
        return [model for (model,) in self._last[1].combinations(_WITH_MODELS, ("model",)) if model]

    def next(self) -> Change:
        """The change since the last look that did not fail."""
        (at, before), (now, after) = self._last, self._take()
        self._last = now, after
        return Change(before, after, max(now - at, 1e-9))

    def _take(self) -> tuple[float, Samples]:
        text = self._read()
        return time.monotonic(), read_samples(text, self._place)


def _check_model(model: str | None, known: list[str]) -> None:
    """Refuse to show a model that the server does not have: it would be an empty screen."""
    if model is not None and model not in known:
        expected = f"one of {', '.join(known)}" if known else "none, as the server has no models"
        raise typer.BadParameter(f"expected {expected}, got {model[:100]!r}", param_hint="--model")


def _look_or_problem(looks: _Looks, model: str | None) -> dict[str, Any]:
    """A look; or what prevented it, as a server that does not answer may do so at the next."""
    try:
        return look(looks.next(), model)
    except HpsError as problem:
        return {"problem": str(problem)}
