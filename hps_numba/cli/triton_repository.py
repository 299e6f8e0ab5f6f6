"""``hps-numba triton-repository``: the models of a config as a model repository of Triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hps_numba.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from hps_numba.config import ServerConfig

__all__ = ["PLUGIN"]

Seconds = Annotated[float | None, typer.Option(min=0, help="Seconds, instead of those of the config.")]


def triton_repository(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A ps_config JSON file; Triton's processes read it.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The repository; it is made if it is missing.")],
    model: Annotated[list[str] | None, typer.Option(help="One model of the config; again for more. By default all.")] = None,
    instances: Annotated[int, typer.Option(min=1, max=1024, help="Processes of a model that answer at a time.")] = 1,
    refresh_interval: Seconds = None,
    refresh_delay: Seconds = None,
    freeze_sparse: Annotated[
        bool, typer.Option("--freeze-sparse", help="A load leaves rows alone that shared and slower tiers have already.")
    ] = False,
    max_batch_size: Annotated[
        int, typer.Option(min=0, help="Triton's; above 0 the first dimension of every tensor is that of samples.")
    ] = 0,
    key_dimensions: Annotated[int, typer.Option(min=1, max=8, help="Dimensions of the keys of each table.")] = 1,
    flat_only: Annotated[
        bool, typer.Option("--flat-only", help="Only KEYS, NUMKEYS and OUTPUT0, and none optional, as HugeCTR's models.")
    ] = False,
    dense: Annotated[
        list[str] | None,
        typer.Option(metavar="[MODEL=]FILE", help="A torch.export program (.pt2) that takes rows; it gives an ensemble."),
    ] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="The config may name Python code, such as tiers.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace models that the repository has.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model repository for Triton Inference Server.

    Each model of the config becomes a model of Triton's Python backend, which takes KEYS and NUMKEYS as HugeCTR's backend, or
    the keys of each table by name. With a dense program there are two more: MODEL_dense, and MODEL_scores, the ensemble of
    both. Start Triton with --model-repository=DIR.
    """
    from hps_numba.config import read_config
    from hps_numba.frontends.triton.repository import RepositoryOptions, write_repository

    read = read_config(config)
    options = RepositoryOptions(
        models=tuple(model or ()),
        instances=instances,
        refresh_interval=refresh_interval,
        refresh_delay=refresh_delay,
        freeze_sparse=freeze_sparse,
        allow_code=allow_code,
        max_batch_size=max_batch_size,
        key_dimensions=key_dimensions,
        flat_only=flat_only,
        dense=dict(_program(read, given) for given in dense or ()),
        overwrite=overwrite,
    )
    written = write_repository(read, folder, options)
    if as_json:
        print_json({"repository": folder, "models": written})
        return
    for name in written:
        typer.echo(f"wrote {folder / name}")


def _program(config: ServerConfig, given: str) -> tuple[str, Path]:
    """``MODEL=FILE``, or ``FILE`` for the only model of a config."""
    name, equals, path = given.partition("=")
    if equals:
        return name, Path(path)
    if len(config.models) > 1:
        raise typer.BadParameter(f"expected MODEL=FILE, as the config has several models, got {given}", param_hint="--dense")
    return config.models[0].model, Path(given)


PLUGIN = triton_repository
