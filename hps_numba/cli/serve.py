"""``hps-numba serve``: serves the models of a config over the network."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hps_numba.cli._output import show_log_lines
from hps_numba.cli._tiers import AllowCode, Config

if TYPE_CHECKING:
    from hps_numba.frontends.open_inference.options import ServeOptions, Tls

__all__ = ["PLUGIN"]

_LIMITS = "Limits (of each worker)"
_SECURITY = "Security"
_PROGRAMS = "Whole models"
_JOINED = 64  # threads where requests are joined, which only wait: as many requests can share a call
_FILE = {"exists": True, "dir_okay": False, "readable": True}
_MIB = 1 << 20


def serve(
    context: typer.Context,
    config: Config,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of HTTP; 0: any that is free.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of gRPC, 0: any that is free; without it there is none.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that serve.")] = 1,
    program: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Also serve a whole model over the tables: a .pt2 file, a .keras file or the folder of a SavedModel. "
            "It can run code: only files that you trust. May be repeated.",
            rich_help_panel=_PROGRAMS,
        ),
    ] = None,
    batch_delay_us: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1_000_000,
            help="Join requests to a whole model that come at the same time, and hold one up for at most so many microseconds.",
            rich_help_panel=_PROGRAMS,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=0, help="Samples of joined requests; 0: as many as the model takes.", rich_help_panel=_PROGRAMS)
    ] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Tokens, one a line; clients need one. Without it: HPS_NUMBA_TOKEN.", rich_help_panel=_SECURITY, **_FILE
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.", rich_help_panel=_SECURITY, **_FILE)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.", rich_help_panel=_SECURITY, **_FILE)] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="Clients need a certificate that one of these signed, PEM.", rich_help_panel=_SECURITY, **_FILE),
    ] = None,
    allow_control: Annotated[
        bool,
        typer.Option("--allow-control", help="Clients may load and unload models of CONFIG.", rich_help_panel=_SECURITY),
    ] = False,
    shared_memory: Annotated[
        list[str] | None,
        typer.Option(
            "--shared-memory",
            help="Clients may have tensors in segments of /dev/shm with names that begin so.",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Of a request.", rich_help_panel=_LIMITS)] = 64,
    max_json_mib: Annotated[int, typer.Option(min=1, help="Of the JSON in it.", rich_help_panel=_LIMITS)] = 4,
    max_keys: Annotated[int, typer.Option(min=1, help="Elements of all inputs of a request.", rich_help_panel=_LIMITS)] = 1
    << 22,
    max_answer_mib: Annotated[int, typer.Option(min=1, help="Of the outputs of a request.", rich_help_panel=_LIMITS)] = 256,
    max_held_mib: Annotated[
        int, typer.Option(min=1, help="Of all requests and answers under way.", rich_help_panel=_LIMITS)
    ] = 1024,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Requests that threads answer at a time.", rich_help_panel=_LIMITS)
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that wait for a thread.", rich_help_panel=_LIMITS)] = 256,
    max_connections: Annotated[int, typer.Option(min=1, help="Open at a time.", rich_help_panel=_LIMITS)] = 2048,
    request_seconds: Annotated[
        float, typer.Option(min=0.001, max=10**6, help="In which a request is answered.", rich_help_panel=_LIMITS)
    ] = 30.0,
    read_seconds: Annotated[
        float, typer.Option(min=0.001, max=10**6, help="In which a request has to arrive.", rich_help_panel=_LIMITS)
    ] = 30.0,
    write_seconds: Annotated[
        float, typer.Option(min=0.001, max=10**6, help="In which a client has to read its answer.", rich_help_panel=_LIMITS)
    ] = 60.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=10**6, help="For which SIGTERM leaves the server accepting, while it is not ready.")
    ] = 1.0,
    stop_seconds: Annotated[float, typer.Option(min=0, max=10**6, help="Most that requests under way then get.")] = 30.0,
    seconds: Annotated[float | None, typer.Option(min=0.001, max=10**7, help="End after so long; else with Ctrl-C.")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Serve the models of a config by the Open Inference Protocol (KServe, version 2).

    One line says where, once requests are answered. SIGTERM and Ctrl-C end it after the requests that it accepted.
    """
    from hps_numba.frontends.open_inference.access import read_tokens
    from hps_numba.frontends.open_inference.limits import Limits
    from hps_numba.frontends.open_inference.options import ServeOptions

    if max_concurrent is None and batch_delay_us is not None:
        max_concurrent = _JOINED
    limits = Limits(
        max_body_bytes=max_body_mib * _MIB,
        max_json_bytes=max_json_mib * _MIB,
        max_keys=max_keys,
        max_answer_bytes=max_answer_mib * _MIB,
        max_held_bytes=max_held_mib * _MIB,
        max_queue=max_queue,
        max_connections=max_connections,
        request_seconds=request_seconds,
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        **({} if max_concurrent is None else {"max_concurrent": max_concurrent}),
    )
    options = ServeOptions(
        config,
        host,
        port,
        grpc_port=grpc_port,
        shared_memory=tuple(shared_memory or ()),
        workers=workers,
        programs=_programs(program or []),
        batch_delay=None if batch_delay_us is None else batch_delay_us / 1e6,
        max_batch=max_batch,
        limits=limits,
        tokens=read_tokens(token_file),
        tls=_tls(tls_cert, tls_key, client_ca),
        allow_control=allow_control,
        allow_code=allow_code,
        drain_seconds=drain_seconds,
        stop_seconds=stop_seconds,
        seconds=seconds,
        verbose=bool(context.parent and context.parent.params.get("verbose")),
    )
    _serve(options)


PLUGIN = serve


def _tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    from hps_numba.frontends.open_inference.options import Tls

    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise typer.BadParameter("expected both --tls-cert and --tls-key", param_hint="--tls-cert")
    return Tls(cert, key, client_ca)


def _programs(given: Sequence[str]) -> dict[str, Path]:
    programs: dict[str, Path] = {}
    for one in given:
        name, _, path = one.partition("=")
        if not (name and path) or name in programs:
            raise typer.BadParameter(f"expected NAME=PATH, each name once, got {one!r}", param_hint="--program")
        programs[name] = Path(path)
    return programs


def _serve(options: ServeOptions) -> None:
    from hps_numba.frontends.open_inference.serving import serve_in_this_process
    from hps_numba.frontends.open_inference.workers import serve_with_workers

    for warning in options.warnings():
        typer.echo(f"warning: {warning}", err=True)
    if options.workers == 1:
        serve_in_this_process(options, _announce)
    else:
        serve_with_workers(options, _announce, _work)


def _announce(urls: Sequence[str]) -> None:
    typer.echo(f"ready: {' '.join(urls)}")


def _work(options: ServeOptions, number: int, listening: socket.socket, link: Connection) -> None:
    """What a worker process runs."""
    from hps_numba.frontends.open_inference.worker import work

    stop = show_log_lines(options.verbose)
    try:
        work(options, number, listening, link)
    finally:
        stop()
