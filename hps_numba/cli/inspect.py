"""``hps-numba inspect``: describes the content of a sparse model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hps_numba.cli._output import AsJson, print_facts, print_json

if TYPE_CHECKING:
    from hps_numba.cli._survey import Survey

__all__ = ["PLUGIN"]

_SHOWN = 6  # values of a row that are printed


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A sparse model of any format: a directory, a file or a URL; FILE#TABLE.")
    ],
    dim: Annotated[int | None, typer.Option(min=1, help="Expected width.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe the content of a sparse model.

    The whole model is read; rows are streamed, so memory does not depend on their number. Duplicate keys are counted exactly:
    if the keys do not ascend, 32 Mi of them (256 MiB) are sorted at a time, and longer tables take several passes.
    """
    from hps_numba.cli._survey import survey_model
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.storage.model_files import open_model
    from hps_numba.storage.urls import place_of

    place = place_of(model, "MODEL")
    with open_model(place, dim) as reader:
        rows = reader.rows
    with rows_progress(rows) as on_rows:
        survey = survey_model(place, dim, on_rows)
    if as_json:
        print_json({**asdict(survey), "first_rows": [{"key": key, "values": row} for key, row in survey.first_rows]})
    else:
        _show(survey)


def _show(survey: Survey) -> None:
    from hps_numba.device.host_memory import human_bytes

    print_facts(
        [
            ("model", survey.path),
            ("format", survey.format + (", with meta" if survey.has_meta else ", without meta")),
            ("rows", f"{survey.rows:,} x {survey.dim} {survey.row_dtype}, {human_bytes(survey.bytes)} on disk"),
            ("keys", _keys(survey)),
            ("duplicates", f"{survey.duplicates:,}" + (" (of equal keys, the last is served)" if survey.duplicates else "")),
            ("values", _values(survey)),
            ("not finite", f"{survey.nan:,} NaN, {survey.infinite:,} infinite"),
            *(("first rows" if number == 0 else "", _row(*row)) for number, row in enumerate(survey.first_rows)),
            *([("not read", ", ".join(survey.ignored))] if survey.ignored else []),
            *(("warning", text) for text in survey.warnings),
        ]
    )


def _keys(survey: Survey) -> str:
    if survey.key_range is None:
        return "none"
    low, high = survey.key_range
    fits = "fit 32 bits" if low >= 0 and high < 2**32 else "need 64 bits"
    return f"{low} .. {high}, {'ascending' if survey.ascending else 'not ascending'}, {fits}"


def _values(survey: Survey) -> str:
    if survey.value_range is None:
        return "none finite"
    low, high = survey.value_range
    return f"{low:.7g} .. {high:.7g}, mean {survey.mean:.4g}"


def _row(key: int, values: list[float]) -> str:
    more = ", ..." if len(values) > _SHOWN else ""
    return f"{key}: [{', '.join(f'{value:.5f}' for value in values[:_SHOWN])}{more}]"


PLUGIN = inspect
