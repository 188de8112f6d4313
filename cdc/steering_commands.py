"""`cdc pause`, `resume`, `resync`, `replay`, `drop`: what a person orders of one source or one sink; `log-level`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Annotated, cast

import typer

from cdc import daemon, kinds, steering
from cdc.api.client import DaemonUnreachable
from cdc.beginning import begun_fact
from cdc.config import LogLevel, SinkConfig, SourceConfig
from cdc.errors import FatalError, TransientError, UnknownTable
from cdc.filling import filled_fact
from cdc.pipeline import paused_fact
from cdc.queue import Queue
from cdc.session import Session
from cdc.sink import Mirror, StreamSink
from cdc.terminal import OneMirror, out
from cdc.wishes import wishes_of

app = typer.Typer()

Name = Annotated[str, typer.Argument(metavar="NAME", help="A source or a sink.")]


@app.command(name="log-level")
def log_level(
    context: typer.Context,
    level: Annotated[LogLevel, typer.Argument(metavar="LEVEL", help="debug, info, warning or error.")],
) -> None:
    """Let the daemon log more or less, until it ends or reads its configuration again (SIGHUP)."""
    context.ensure_object(Session).client().set_log_level(level)
    print(f"the log begins at {level}")


@app.command()
def pause(context: typer.Context, name: Name) -> None:
    """Pause a source or a sink until `cdc resume`, also over restarts."""
    context.ensure_object(Session).client().pause(name)
    print(f"{name} is paused")


@app.command()
def resync(
    context: typer.Context,
    name: Name,
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="TABLE", help="schema.table, or database.collection; all, if left out."),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Even if it looks like another database than before.")] = False,
) -> None:
    """Compare a mirror (or all of a source) with its source and put it right, also after a gap; the stream goes on."""
    session = context.ensure_object(Session)
    if name not in session.config.sources:
        (sink,) = session.sinks(name)
        _check_mirrored(session, sink, tables or ())
    try:
        ordered = session.client().resync(name, tables or (), yes=yes)
    except DaemonUnreachable:
        with session.lock(), _queue_of(session, name) as queues:
            ordered = steering.resync(session.config, queues, name, tables or (), failures=None, yes=yes)
        print("the daemon is not running: it is done when `cdc run` starts", file=sys.stderr)
    out.print(*ordered.lines(), sep="\n", markup=False, soft_wrap=True)


def _check_mirrored(session: Session, sink: SinkConfig, tables: Sequence[str]) -> None:
    """A typing error should be told here. Where the target is away just now, the daemon's log will tell."""
    if not tables or not sink.is_mirror:
        return
    with suppress(TransientError):
        mirrored = set(map(str, cast("Mirror", session.build_sink(sink)).copied()))
        if unknown := [table for table in tables if "." in table and table not in mirrored]:
            names = ", ".join(sorted(mirrored))
            raise UnknownTable(f"sink {sink.name} has no table {', '.join(unknown)}", hint=f"one of: {names}")


@app.command()
def replay(
    context: typer.Context,
    sink: OneMirror,
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
            _drop_sink(session, session.config.sinks[name])
    print(f"dropped: {what}")


def _drop_source(session: Session, source: SourceConfig) -> None:
    kinds.pair(source.kind).drop_source(source)
    path = daemon.queue_path(session.data_dir, source.name)
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _drop_sink(session: Session, sink: SinkConfig) -> None:
    config = session.config
    if sink.is_mirror:
        kinds.pair(sink.kind).drop_sink(sink)
    else:
        cast("StreamSink", session.build_sink(sink)).forget()
    if not daemon.queue_path(session.data_dir, sink.source).exists():
        return
    with closing(daemon.open_queue(config, sink.source)) as queue:
        queue.retain(other.name for other in config.sinks_of(sink.source) if other.name != sink.name)
        for fact in (filled_fact(sink.name), begun_fact(sink.name), paused_fact(sink.name), *wishes_of(sink.name)):
            queue.set(fact, None)
