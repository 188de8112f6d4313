"""The command line: the only place that puts sources, queue and sinks together."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
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
    kinds,
    letter_commands,
    logs,
    mirror_commands,
    preflight,
    status_table,
    steering,
)
from cdc.api.client import DaemonUnreachable
from cdc.beginning import begin, begun_fact
from cdc.config import Config, SinkConfig, SourceConfig
from cdc.config_file import load
from cdc.copy import Copy, PlannedTable
from cdc.copy_progress import CopyProgress, reported
from cdc.daemon import Parts
from cdc.errors import CdcError, FatalError, TransientError, UnknownTable
from cdc.feed.place import served
from cdc.filling import capturing, fill, filled_fact
from cdc.http_config import listening_on
from cdc.kinds import build_source
from cdc.pipeline import paused_fact
from cdc.position import Position
from cdc.queue import Queue
from cdc.session import NoFacts, Session
from cdc.sink import Mirror, Sink, SinkContext, StreamSink
from cdc.stats import CaptureStats, DeliveryStats
from cdc.status import DaemonStatus, to_json
from cdc.terminal import AnySink, AsJson, OneSink, exit_unless, out, print_json
from cdc.wishes import wishes_of
from sinks import load as load_sink
from sinks import options_of
from sinks.data_changes import DataChangesSink

app = typer.Typer(
    help="Capture every change of a database, and mirror it.",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
app.add_typer(mirror_commands.app)
app.add_typer(letter_commands.app, name="dead-letters")

Name = Annotated[str, typer.Argument(help="A source or a sink.")]


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
        row_limits=config.http.row_limits,
    )
    return cast("Sink", load_sink(sink.kind)(sink, context))


def build_parts(config: Config) -> Parts:
    """What the daemon is made of."""

    def fill_sink(sink: SinkConfig, built: Sink, queue: Queue, stats: DeliveryStats, stop: threading.Event) -> None:
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

    return Parts(
        source=lambda source, queue: build_source(config, source, queue),
        sink=lambda sink: build_sink(config, sink),
        fill=fill_sink,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    config: Annotated[Path, typer.Option("--config", envvar="CDC_CONFIG", help="The configuration file.")] = Path(
        "cdc.toml"
    ),
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Capture every change of a database, and mirror it."""
    logs.configure(level="debug" if debug else "warning")
    context.obj = Session(lambda: load(config, options_of=options_of), debug=debug)


@app.command()
def check(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Look for what would keep the daemon from its work, and say how to put it right. Changes nothing."""
    config = context.ensure_object(Session).config
    sections = [
        preflight.collect(
            "daemon", [*preflight.check_data_dir(config), *preflight.guard("http", _check_served(config))]
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
def init(
    context: typer.Context,
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="The only one, if left out.")] = None,
    *,
    ddl_capture: Annotated[
        bool, typer.Option("--ddl-capture", help="Let the source's database tell of each DDL, by event triggers.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what this has made.")] = False,
    print_only: Annotated[bool, typer.Option("--print", help="Only print the SQL, for a superuser to run.")] = False,
) -> None:
    """Prepare a source's database for what the daemon may not do by itself. Everything works without it."""
    session = context.ensure_object(Session)
    if not ddl_capture:
        raise FatalError("it is not said what to prepare", hint="cdc init --ddl-capture [SOURCE]")
    chosen = session.source(source)
    pair = kinds.pair(chosen.kind)
    script = pair.ddl_capture_script(chosen, remove=remove)
    if print_only:
        print(script)
        return
    pair.run_script(chosen, script)
    print(f"{chosen.name}: DDL {'is no longer' if remove else 'is'} captured by event triggers")


@app.command()
def run(context: typer.Context) -> None:
    """Copy what was never copied, then mirror every change until SIGTERM."""
    session = context.ensure_object(Session)
    config = session.config
    session.log_as_configured()
    drained = daemon.run(config, build_parts(config))
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
    chosen = [each for each in session.sinks(sink) if not each.is_mirror]
    if not chosen:
        raise FatalError("there is no feed to prune", hint='name a sink of kind = "data_changes"')
    if entity_type is not None and hours_to_keep is None:
        raise FatalError("--type goes with --hours-to-keep", hint="without, every type has its own retention")
    seconds = None if hours_to_keep is None else hours_to_keep * 3600
    for each in chosen:
        removed = cast("DataChangesSink", build_sink(session.config, each)).prune(seconds, entity_type)
        print(f"{each.name}: {removed:,} changes removed")


@app.command()
def copy(
    context: typer.Context,
    sink: AnySink = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be copied.")] = False,
) -> None:
    """Copy what was never copied, and end; `cdc run` does so by itself."""
    session = context.ensure_object(Session)
    sinks = session.mirrors(sink)
    if dry_run:
        out.print(_plans({sink.name: _plan(session.config, sink) for sink in sinks}))
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


def _copy(config: Config, sink: SinkConfig) -> None:
    """The stream is captured meanwhile: what the source's server need not keep longer, it may forget."""
    progress, stats = CopyProgress(), DeliveryStats(sink.name, sink.source)
    mirror = cast("Mirror", build_sink(config, sink))
    with closing(daemon.open_queue(config, sink.source)) as queue:
        source = build_source(config, config.sources[sink.source], queue)
        reader = build_source(config, config.sources[sink.source], queue)
        reader.tables(), mirror.copied()  # a server that is away now is an error; later it is waited for
        with capturing(source, queue, CaptureStats(sink.source)), reported(progress, Console(stderr=True)):
            fill(reader, mirror, queue, stats=stats, options=sink.copy, stop=threading.Event(), progress=progress)
    now = progress.snapshot()
    print(f"{sink.name}: {len(now.tables)} tables copied, {now.rows:,} rows in {now.seconds:.1f} s")


@app.command()
def status(
    context: typer.Context,
    *,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second.")] = False,
) -> None:
    """Show where everything stands. Exit code 1 if anything is in trouble, or the daemon is not running."""
    session = context.ensure_object(Session)
    current = session.status()
    if as_json:
        print_json(to_json(current))
    elif watch:
        current = _watch(session, current)
    else:
        out.print(status_table.render(current))
    exit_unless(current.healthy)


def _watch(session: Session, current: DaemonStatus) -> DaemonStatus:
    """Until Ctrl-C, which is the way to end it and no error; returns what was shown last."""
    with suppress(KeyboardInterrupt), Live(console=out, auto_refresh=False, screen=out.is_terminal) as live:
        while True:
            live.update(status_table.render(current), refresh=True)
            time.sleep(1)
            current = session.status()
    return current


@app.command()
def pause(context: typer.Context, name: Name) -> None:
    """Pause a source or a sink until `cdc resume`, also over restarts."""
    context.ensure_object(Session).client().pause(name)
    print(f"{name} is paused")


@app.command()
def resync(
    context: typer.Context,
    name: Name,
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help="schema.table; all if none.")] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Even if it looks like another database than before.")] = False,
) -> None:
    """Compare a mirror (or all of a source) with its source and put it right, also after a gap; the stream goes on."""
    session = context.ensure_object(Session)
    if name not in session.config.sources:
        (sink,) = session.sinks(name)
        _check_mirrored(session.config, sink, tables or ())
    try:
        ordered = session.client().resync(name, tables or (), yes=yes)
    except DaemonUnreachable:
        with session.lock(), _queue_of(session, name) as queues:
            ordered = steering.resync(session.config, queues, name, tables or (), failures=None, yes=yes)
        print("the daemon is not running: it is done when `cdc run` starts", file=sys.stderr)
    out.print(*ordered.lines(), sep="\n", markup=False, soft_wrap=True)


def _check_mirrored(config: Config, sink: SinkConfig, tables: Sequence[str]) -> None:
    """A typing error should be told here. Where the target is away just now, the daemon's log will tell."""
    if not tables or not sink.is_mirror:
        return
    with suppress(TransientError):
        mirrored = set(map(str, cast("Mirror", build_sink(config, sink)).copied()))
        if unknown := [table for table in tables if "." in table and table not in mirrored]:
            names = ", ".join(sorted(mirrored))
            raise UnknownTable(f"sink {sink.name} has no table {', '.join(unknown)}", hint=f"one of: {names}")


@app.command()
def replay(
    context: typer.Context,
    sink: OneSink,
    *,
    since: Annotated[
        str, typer.Option("--from", help="A seq, a time (2025-01-31T12:00:00Z), or how long ago (30s, 15m, 2h, 1d).")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many changes that are.")] = False,
) -> None:
    """Deliver to a mirror once more what the queue still keeps (queue.keep_seconds)."""
    session = context.ensure_object(Session)
    session.sinks(sink)
    try:
        replayed = session.client().replay(sink, since, dry_run=dry_run)
    except DaemonUnreachable:
        with session.lock(), _queue_of(session, sink) as queues:
            (queue,) = queues.values()
            replayed = steering.replay(session.config, queue, sink, since, dry_run=dry_run)
    verb = "would be" if dry_run else "are"
    print(f"{sink}: {replayed.changes:,} changes {verb} delivered again, those after batch {replayed.after_seq}")


@contextmanager
def _queue_of(session: Session, name: str) -> Iterator[dict[str, Queue]]:
    """The queue of a source or a sink, by its source's name."""
    config = session.config
    source = name if name in config.sources else config.sinks[name].source
    if not daemon.queue_path(session.data_dir, source).exists():
        raise FatalError(f"source {source} was never captured", hint="start with `cdc run`")
    with closing(daemon.open_queue(config, source)) as queue:
        yield {source: queue}


@app.command()
def resume(context: typer.Context, name: Name) -> None:
    """Let a paused source or sink go on, and a failed one try again."""
    context.ensure_object(Session).client().resume(name)
    print(f"{name} goes on")


@app.command()
def drop(
    context: typer.Context,
    name: Name,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """End the replication of a source or into a sink. The rows in the target stay."""
    session = context.ensure_object(Session)
    if name in session.config.sources:
        source = session.config.sources[name]
        upstream = kinds.pair(source.kind).left_at_source(source)
        what = f"{upstream}{' and ' if upstream else ''}the queue of source {name}"
    else:
        (sink,) = session.sinks(name)
        what = f"the position of sink {name}, in the target and in the queue of source {sink.source}"
    with session.lock():
        if not yes:
            typer.confirm(f"Drop {what}?", abort=True, err=True)
        if name in session.config.sources:
            _drop_source(session, session.config.sources[name])
        else:
            _drop_sink(session.config, session.config.sinks[name])
    print(f"dropped: {what}")


def _drop_source(session: Session, source: SourceConfig) -> None:
    kinds.pair(source.kind).drop_source(source)
    path = daemon.queue_path(session.data_dir, source.name)
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _drop_sink(config: Config, sink: SinkConfig) -> None:
    if sink.is_mirror:
        kinds.pair(sink.kind).drop_sink(sink)
    else:
        cast("StreamSink", build_sink(config, sink)).forget()
    if not daemon.queue_path(Path(config.daemon.data_dir), sink.source).exists():
        return
    with closing(daemon.open_queue(config, sink.source)) as queue:
        queue.retain(other.name for other in config.sinks_of(sink.source) if other.name != sink.name)
        for fact in (filled_fact(sink.name), begun_fact(sink.name), paused_fact(sink.name), *wishes_of(sink.name)):
            queue.set(fact, None)


if __name__ == "__main__":
    main()
