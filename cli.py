"""The command line: the only place that puts sources, queue and sinks together."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, cast

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cdc import (
    __version__,
    daemon,
    gateway,
    init_commands,
    kinds,
    letter_commands,
    logs,
    mirror_commands,
    preflight,
    status_table,
    steering_commands,
)
from cdc.beginning import begin
from cdc.config import Config, SinkConfig
from cdc.config_file import load
from cdc.copy import Copy, PlannedTable
from cdc.copy_progress import CopyProgress, reported
from cdc.errors import CdcError, FatalError
from cdc.feed.place import served
from cdc.filling import capturing, fill
from cdc.http_config import listening_on
from cdc.kinds import build_source
from cdc.pipeline import Wiring
from cdc.position import Position
from cdc.queue import Queue
from cdc.session import NoFacts, Session
from cdc.sink import Mirror, Pruning, Sink, SinkContext, StreamSink
from cdc.stats import CaptureStats, DeliveryStats
from cdc.status import DaemonStatus, to_json
from cdc.terminal import AnyMirror, AnySink, AsJson, Commands, exit_unless, out, print_json
from sinks import load as load_sink
from sinks import options_of

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
app.add_typer(init_commands.app)
app.add_typer(steering_commands.app)
app.add_typer(mirror_commands.app)
app.add_typer(letter_commands.app, name="dead-letters")


def main() -> None:
    """Run a command. An error is one line and a hint; exit code 2 for the configuration, 1 for the rest."""
    try:
        app(prog_name="cdc")
    except CdcError as exc:
        _complain(str(exc), exc.hint)
        sys.exit(exc.exit_code)
    except Exception as exc:  # noqa: BLE001 - the process's outer edge
        _complain(f"unexpected: {type(exc).__name__}: {exc}", "run with --debug for a traceback")
        sys.exit(1)


def _complain(error: str, hint: str) -> None:
    """Called while the error is being handled."""
    if "--debug" in sys.argv:
        print(logs.redact(traceback.format_exc()), file=sys.stderr)
    print(logs.redact(f"error: {' '.join(error.split())}"), file=sys.stderr)
    if hint:
        print(logs.redact(f"hint: {' '.join(hint.split())}"), file=sys.stderr)


def build_sink(config: Config, sink: SinkConfig) -> Sink:
    """The sink of a configuration, with a way to read a row of its source again."""
    source = build_source(config, config.sources[sink.source], NoFacts())
    context = SinkContext(
        source=config.sources[sink.source],
        data_dir=Path(config.daemon.data_dir),
        reread=source.reread,
        primary_key=source.primary_key,
        shapes=source.shapes,
        dump_schema=source.dump_schema,
        row_limits=config.http.row_limits,
    )
    return cast("Sink", load_sink(sink.kind)(sink, context))


def build_wiring(reload: Callable[[], Config]) -> Wiring:
    """What the daemon is made of."""

    def fill_sink(config: Config, built: Sink, queue: Queue, stats: DeliveryStats, stop: threading.Event) -> None:
        sink = config.sinks[built.name]
        if not sink.is_mirror:
            begin(cast("StreamSink", built), queue, stats=stats, stop=stop)
            return
        source = build_source(config, config.sources[sink.source], queue)
        progress = CopyProgress()
        with reported(progress, Console(stderr=True, force_terminal=False)):
            fill(
                source,
                cast("Mirror", built),
                queue,
                stats=stats,
                options=sink.copy,
                stop=stop,
                progress=progress,
                resyncs=config.sources[sink.source].on_gap == "resync",
            )

    return Wiring(
        source=build_source,
        sink=build_sink,
        fill=fill_sink,
        reload=reload,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    config: Annotated[
        Path, typer.Option("--config", envvar="CDC_CONFIG", readable=False, help="The configuration file.")
    ] = Path("cdc.toml"),
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Capture every change of a database, and mirror it.

    Exit codes: 0 all is well, 1 it is not, 2 the command line or the configuration has a mistake.
    """
    logs.configure(level="debug" if debug else "warning")
    context.obj = Session(lambda: load(config, options_of=options_of), build_sink, debug=debug)


@app.command()
def check(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Look for what would keep the daemon from its work, and say how to put it right. Changes nothing.

    Exit code 1 if anything would.
    """
    config = context.ensure_object(Session).config
    sections = [
        preflight.collect(
            "daemon",
            [
                *preflight.check_data_dir(config),
                *preflight.guard("certificate", preflight.check_certificate(config)),
                *preflight.guard("http", preflight.check_address(config)),
                *preflight.guard("http", _check_served(config)),
            ],
        ),
        *(
            preflight.collect(f"source {name}", kinds.preflight(source.kind).check_source(config, source))
            for name, source in config.sources.items()
        ),
        *(preflight.collect(f"sink {name}", _check_sink(config, sink)) for name, sink in config.sinks.items()),
    ]
    if as_json:
        print_json(preflight.as_json(sections))
    else:
        out.print(preflight.render(sections))
    exit_unless(not preflight.failed(sections))


def _check_served(config: Config) -> Iterator[preflight.Finding]:
    if (place := served(config)) is not None:
        yield preflight.Finding("ok", "http", f"serves the feed {place.table}")


def _check_sink(config: Config, sink: SinkConfig) -> Iterator[preflight.Finding]:
    if sink.is_mirror:
        return kinds.preflight(sink.kind).check_sink(config, sink)
    return cast("StreamSink", build_sink(config, sink)).check()


@app.command()
def run(context: typer.Context) -> None:
    """Copy what was never copied, then mirror every change until SIGTERM."""
    session = context.ensure_object(Session)
    config = session.config
    session.log_as_configured()
    drained = daemon.run(config, build_wiring(session.reload))
    sys.stderr.flush()
    os._exit(0 if drained else 1)  # the interpreter would wait for threads that did not end in time


@app.command()
def serve(
    context: typer.Context,
    *,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT, instead of the configured one.")] = None,
) -> None:
    """Serve the feed over HTTP and WebSocket until SIGTERM, and capture nothing. There may be many such gateways."""
    session = context.ensure_object(Session)
    config = session.config
    if listen is not None:
        config = msgspec.structs.replace(config, http=listening_on(config.http, listen))
    session.log_as_configured()
    gateway.run(config)


@app.command()
def prune(
    context: typer.Context,
    sink: AnySink = None,
    *,
    hours_to_keep: Annotated[
        float | None, typer.Option(min=0, help="Remove what is older, whatever the retention of its type says.")
    ] = None,
    entity_type: Annotated[str | None, typer.Option("--type", help="With --hours-to-keep: of this type alone.")] = None,
) -> None:
    """Remove old changes from the feed now; the daemon does so by itself."""
    session = context.ensure_object(Session)
    built = [session.build_sink(each) for each in session.sinks(sink)]
    chosen = [each for each in built if isinstance(each, Pruning)]
    if not chosen:
        raise FatalError("there is no feed to prune", hint='name a sink of kind = "data_changes"')
    if entity_type is not None and hours_to_keep is None:
        raise FatalError("--type goes with --hours-to-keep", hint="without, every type has its own retention")
    seconds = None if hours_to_keep is None else hours_to_keep * 3600
    for each in chosen:
        removed = each.prune(seconds, entity_type)
        print(f"{each.name}: {removed:,} changes removed")


@app.command()
def copy(
    context: typer.Context,
    sink: AnyMirror = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be copied.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON, and nothing else.")] = False,
) -> None:
    """Copy what was never copied, and end; `cdc run` does so by itself."""
    if as_json and not dry_run:
        raise FatalError("--json goes with --dry-run", hint="`cdc status --json` tells of a copy that runs")
    session = context.ensure_object(Session)
    sinks = session.mirrors(sink)
    if dry_run:
        plans = {sink.name: _plan(session.config, sink) for sink in sinks}
        if as_json:
            print_json(_plans_as_json(plans))
        else:
            out.print(_plans(plans))
        return
    session.log_as_configured()
    with session.lock():
        for chosen in sinks:
            _copy(session.config, chosen)


def _plan(config: Config, sink: SinkConfig) -> list[PlannedTable]:
    source = build_source(config, config.sources[sink.source], NoFacts())
    mirror = cast("Mirror", build_sink(config, sink))
    return Copy(source, mirror, source.tables(), Position("", 0, 0)).plan()


def _plans(plans: dict[str, list[PlannedTable]]) -> Table:
    table = Table("sink", "table", "rows (about)", "bytes (about)", "", box=None, pad_edge=False)
    for sink, planned in plans.items():
        for each in planned:
            todo = "to copy" if each.copied_at is None else "copied"
            table.add_row(sink, str(each.table), f"{each.rows:,}", f"{each.size:,}", todo)
    return table


def _plans_as_json(plans: dict[str, list[PlannedTable]]) -> bytes:
    """By sink. rows, bytes: the source's estimates."""
    sinks = {
        sink: [
            {"table": str(each.table), "rows": each.rows, "bytes": each.size, "copied": each.copied_at is not None}
            for each in planned
        ]
        for sink, planned in plans.items()
    }
    return msgspec.json.encode({"sinks": sinks})


def _copy(config: Config, sink: SinkConfig) -> None:
    """The stream is captured meanwhile: what the source's server need not keep longer, it may forget."""
    progress, stats = CopyProgress(), DeliveryStats(sink.name, sink.source)
    mirror = cast("Mirror", build_sink(config, sink))
    with closing(daemon.open_queue(config, sink.source)) as queue:
        source = build_source(config, config.sources[sink.source], queue)
        reader = build_source(config, config.sources[sink.source], queue)
        reader.tables(), mirror.copied()  # a server that is away now is an error; later it is waited for
        with capturing(source, queue, CaptureStats(sink.source)), reported(progress, Console(stderr=True)):
            finished = fill(
                reader, mirror, queue, stats=stats, options=sink.copy, stop=threading.Event(), progress=progress
            )
    now = progress.snapshot()
    print(f"{sink.name}: {len(now.tables)} tables copied, {now.rows:,} rows in {now.seconds:.1f} s")
    if not finished:
        print(f"{sink.name}: `cdc run` builds the rest (indexes, constraints) when it has caught up")


@app.command()
def status(
    context: typer.Context,
    *,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second.")] = False,
) -> None:
    """Show where everything stands. Exit code 1 if there is a problem, or the daemon is not running."""
    session = context.ensure_object(Session)
    current = session.status()
    if as_json:
        print_json(to_json(current))
    elif watch:
        current = _watch(session, current)
    else:
        out.print(status_table.render(current))
    exit_unless(current.healthy and not current.problems)


def _watch(session: Session, current: DaemonStatus) -> DaemonStatus:
    """Until Ctrl-C, which is the way to end it and no error; returns what was shown last."""
    with suppress(KeyboardInterrupt), Live(console=out, auto_refresh=False, screen=out.is_terminal) as live:
        while True:
            live.update(status_table.render(current), refresh=True)
            time.sleep(1)
            current = session.status()
    return current


if __name__ == "__main__":
    main()
