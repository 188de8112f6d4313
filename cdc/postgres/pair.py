"""What the command line does with a PostgreSQL source and its PostgreSQL mirror: verify, cut over, drop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Final

from cdc.change import TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.cutover import CutoverResult, cutover
from cdc.errors import FatalError
from cdc.mirroring import Mirroring
from cdc.position import SourcePosition
from cdc.postgres import ddl_capture
from cdc.postgres.connection import connect, table_exists, translated_errors
from cdc.postgres.cutover import PostgresHandover
from cdc.postgres.digest import Comparison, plan_comparison
from cdc.postgres.preflight_server import reveal
from cdc.postgres.publication import captured_tables
from cdc.postgres.publication_setup import drop_publications, existing_publications
from cdc.postgres.resync import resync
from cdc.postgres.schema import read_tables
from cdc.postgres.slot import drop_slot
from cdc.postgres.target import CopyTarget
from cdc.resync import ResyncReport, Wanted
from cdc.verify import verify_at_barrier
from cdc.verify_report import VerifyReport


def verify_pair(mirroring: Mirroring) -> VerifyReport:
    """Compare all captured tables; exact where the barrier is."""
    source, sink = mirroring.source, mirroring.sink
    comparison = _comparison(source, sink)
    return verify_at_barrier(
        partial(comparison.source_view, reveal(source.url)),
        partial(comparison.target_view, reveal(sink.url)),
        mirroring.barrier,
        comparison.tables,
        workers=sink.copy.workers,
    )


def cut_over_pair(mirroring: Mirroring, *, timeout_seconds: float, progress: Callable[[str], None]) -> CutoverResult:
    """Make the mirror the database to write to."""
    source, sink = mirroring.source, mirroring.sink
    assert mirroring.position is not None, "a daemon runs"
    handover = PostgresHandover(
        reveal(source.url),
        reveal(sink.url),
        publications=_publications(source),
        sink=sink,
        tables=_comparison(source, sink).tables,
        position=mirroring.position,
    )
    with closing(handover):
        return cutover(handover, partial(verify_pair, mirroring), timeout_seconds=timeout_seconds, progress=progress)


def resync_pair(mirroring: Mirroring, table: TableName, wanted: Wanted, *, dry_run: bool) -> ResyncReport:
    """Put single rows right, in order with the stream."""
    with connect(reveal(mirroring.source.url)) as left, connect(reveal(mirroring.sink.url)) as right:
        comparison = plan_comparison(left, right, mirroring.sink, [table])
    if table in comparison.problems:
        raise FatalError(comparison.problems[table])
    return resync(mirroring, comparison, table, wanted, dry_run=dry_run)


def stored_position(sink: SinkConfig) -> SourcePosition | None:
    """Where the mirror itself says that it stands; `None` if it was never filled."""
    position = CopyTarget(sink).stored_position()
    return None if position is None else position.source


def ddl_capture_script(source: SourceConfig, *, remove: bool) -> str:
    """The SQL that installs the event triggers for the role of the source's URL, or removes them."""
    if remove:
        return ddl_capture.removal()
    with connect(reveal(source.url)) as connection, translated_errors():
        ((role,),) = connection.execute("SELECT current_user").fetchall()
    return ddl_capture.installation(role)


def run_script(source: SourceConfig, script: str) -> None:
    """Run it as a whole, or not at all."""
    with connect(reveal(source.url)) as connection:
        ddl_capture.execute(connection, script)


def left_at_source(source: SourceConfig) -> str:
    """What `drop_source` removes."""
    return f"slot {source.slot}, publication {source.publication}"


def drop_source(source: SourceConfig) -> None:
    """Drop slot and publications, both or none. The server keeps no more WAL for this source."""
    with connect(reveal(source.url)) as connection, translated_errors(), connection.transaction():
        drop_publications(connection, source)
        drop_slot(connection, source.slot)  # which no rollback brings back


def drop_sink(sink: SinkConfig) -> None:
    """Forget in the target that it is our mirror; its tables and their rows stay."""
    with connect(reveal(sink.url)) as connection, translated_errors(), connection.transaction():
        for table, forget in _BOOKKEEPING.items():
            if table_exists(connection, table):
                connection.execute(forget, [sink.name])


def _publications(source: SourceConfig) -> tuple[str, ...]:
    with connect(reveal(source.url)) as connection:
        return existing_publications(connection, source)


def _comparison(source: SourceConfig, sink: SinkConfig) -> Comparison:
    with connect(reveal(source.url)) as left, connect(reveal(sink.url)) as right:
        tables = [table.name for table in captured_tables(source, read_tables(left))]
        if not tables:
            raise FatalError(
                f"nothing to compare: no table of source {source.name} matches {', '.join(source.tables.include)}",
                hint="correct `tables` in its configuration (globs over schema.table)",
            )
        return plan_comparison(left, right, sink, tables)


_BOOKKEEPING: Final = {
    "cdc.positions": "DELETE FROM cdc.positions WHERE sink = %s",
    "cdc.tables": "DELETE FROM cdc.tables WHERE sink = %s",
    "cdc.resyncs": "DELETE FROM cdc.resyncs WHERE sink = %s",
    "cdc.replays": "DELETE FROM cdc.replays WHERE sink = %s",
    "cdc.post_data": "DELETE FROM cdc.post_data WHERE sink = %s",
    "cdc.settled": "DELETE FROM cdc.settled WHERE sink = %s",
}
