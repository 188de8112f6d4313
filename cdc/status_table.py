"""The status for a terminal: who stands where, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cdc.position import describe_position
from cdc.stats import State
from cdc.status import DaemonStatus, SinkStatus, SourceStatus

_COLORS = {
    State.RUNNING: "green",
    State.FAILED: "red",
    State.STOPPED: "red",
    State.WAITING: "yellow",
    State.PAUSED: "yellow",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")


def render(status: DaemonStatus) -> RenderableType:
    """Two tables, and a line for each problem with its hint below."""
    return Group(_headline(status), Text(), _sources(status), Text(), _sinks(status), *_problems(status))


def _headline(status: DaemonStatus) -> Text:
    if status.started_at is None:
        return Text("daemon is not running; this is what its data directory tells", style="bold red")
    health = Text("healthy", style="green") if status.healthy else Text("not healthy", style="bold red")
    return Text.assemble(f"cdc {status.version}, up {duration(time.time() - status.started_at)}, ", health)


def _sources(status: DaemonStatus) -> Table:
    table = _table("source", "state", "lag", "confirmed", "changes", "queue", "WAL kept")
    for name, source in status.sources.items():
        table.add_row(
            Text(name),
            _state(source.state),
            _lag(source),
            describe_position(source.confirmed or ""),
            f"{sum(source.changes.values()):,}",
            f"{_size(source.queue.bytes)} of {_size(source.queue.max_bytes)}" if source.queue else "",
            _size(source.slot.retained_bytes) if source.slot else "",
        )
    return table


def _sinks(status: DaemonStatus) -> Table:
    table = _table("sink", "state", "lag", "position", "changes", "from", "copy")
    for name, sink in status.sinks.items():
        table.add_row(
            Text(name),
            _state(sink.state),
            _lag(sink),
            describe_position(sink.position or ""),
            f"{sum(sink.changes.values()):,}",
            Text(sink.source),
            _copy(sink),
        )
    return table


def _problems(status: DaemonStatus) -> list[Text]:
    hints = {name: source.hint for name, source in status.sources.items()}
    hints |= {name: sink.hint for name, sink in status.sinks.items()}
    lines = [Text()] if status.problems else []
    for problem in status.problems:
        lines.append(Text(problem, style="red"))
        if hint := hints.get(problem.partition(":")[0]):
            lines.append(Text(f"  {hint}", style="cyan"))
    insert_only = [
        f"{name}: {', '.join(source.insert_only)}" for name, source in status.sources.items() if source.insert_only
    ]
    lines += [Text(f"inserts only: {line}", style="yellow") for line in insert_only]
    lines += [
        Text(f"{name}: resync: {sink.resync.error}", style="yellow")
        for name, sink in status.sinks.items()
        if sink.resync is not None and sink.resync.error
    ]
    parked = [Text(line, style="yellow") for line in _parked_lines(status)]
    seen = [Text("  `cdc dead-letters list` shows them", style="cyan")] if parked else []
    return [*lines, *parked, *seen]


def _parked_lines(status: DaemonStatus) -> Iterator[str]:
    for name, sink in status.sinks.items():
        if sink.parked:
            age = (
                "" if sink.parked_oldest_seconds is None else f", the oldest for {duration(sink.parked_oldest_seconds)}"
            )
            yield f"{name}: {sink.parked:,} changes are parked ({sink.dead:,} dead){age}: transactions are torn"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in {"lag", "changes", "queue", "WAL kept"} else "left")
    return table


def _state(state: State) -> Text:
    return Text(state, style=_COLORS.get(state, "cyan"))


def _lag(pipeline: SourceStatus | SinkStatus) -> str:
    known = []
    if pipeline.lag_seconds is not None:
        known.append(duration(pipeline.lag_seconds))
    if pipeline.lag_bytes is not None:
        known.append(_size(pipeline.lag_bytes))
    return ", ".join(known) or "unknown"


def _copy(sink: SinkStatus) -> str:
    if (resync := sink.resync) is not None:
        if not resync.tables_expected:
            return "resync: ordered"
        percent = min(100 * resync.rows_done // max(resync.rows_expected, 1), 100)
        tables = f"resync: {resync.tables_done}/{resync.tables_expected} tables"
        return f"{tables}, {resync.rows_done:,} rows, {percent} %{', waits' if resync.error else ''}"
    copy = sink.copy
    if copy is None or copy.tables_done == copy.tables_expected:
        return ""
    left = f", {duration(copy.seconds_left)} left" if copy.seconds_left is not None else ""
    return f"{copy.tables_done}/{copy.tables_expected} tables, {copy.rows_done:,} rows{left}"


def duration(seconds: float) -> str:
    """For people: `12.0 s`, `3 min 5 s`, `2 h 7 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"
