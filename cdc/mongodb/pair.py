"""What the command line does with a MongoDB source and its MongoDB mirror: verify, cut over, drop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Final

from cdc.change import TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.cutover import CutoverResult, cutover
from cdc.errors import FatalError
from cdc.mirroring import Mirroring, ReadPosition
from cdc.mongodb.client import Client, connect, translated_errors
from cdc.mongodb.collections import CollectionInfo, differences, read_collections, read_indexes
from cdc.mongodb.comparison import CatchUp, compare, keys
from cdc.mongodb.cutover import MongoHandover, nudge
from cdc.mongodb.digest import CollectionDigest, shown_id
from cdc.mongodb.moment import encode_moment, has_passed
from cdc.mongodb.positions import OWN_PREFIX, Positions
from cdc.mongodb.resync import Resync
from cdc.mongodb.snapshot import now
from cdc.mongodb.target import MongoCopyTarget
from cdc.position import SourcePosition
from cdc.resync import ResyncReport, Wanted
from cdc.secret import Secret
from cdc.verify_report import Keys, TableReport, VerifyReport

MAX_KEYS: Final = 20
PATIENCE_SECONDS: Final = 60.0
"""How long the mirror may take to pass what the source showed."""

_POLL_SECONDS: Final = 0.05


def verify_pair(mirroring: Mirroring, *, patience_seconds: float = PATIENCE_SECONDS) -> VerifyReport:
    """Compare all captured collections, and those that only the mirror has."""
    source, sink = mirroring.source, mirroring.sink
    started = time.monotonic()
    tables = mirroring.tables()
    with ExitStack() as stack:
        left = stack.enter_context(connect(_url(source.url), application_name="cdc-verify"))
        right = stack.enter_context(connect(_url(sink.url), application_name="cdc-verify"))
        verification = _Verification(left, right, sink, waiting(left, mirroring.position, patience_seconds))
        gone = _left_behind(right, sink, source, tables)
        if not tables and not gone:
            raise FatalError(
                f"nothing to compare: no collection of source {source.name} matches {', '.join(source.tables.include)}",
                hint="correct `tables` in its configuration (globs over database.collection)",
            )
        reports = [verification.report(table) for table in [*tables, *gone]]
    return VerifyReport(
        equal=all(report.equal for report in reports),
        exact=verification.sure,
        tables=tuple(reports),
        seconds=round(time.monotonic() - started, 3),
    )


def cut_over_pair(mirroring: Mirroring, *, timeout_seconds: float, progress: Callable[[str], None]) -> CutoverResult:
    """Make the mirror the database to write to."""
    with closing(MongoHandover(mirroring)) as handover:
        return cutover(handover, partial(verify_pair, mirroring), timeout_seconds=timeout_seconds, progress=progress)


def resync_pair(mirroring: Mirroring, table: TableName, wanted: Wanted, *, dry_run: bool) -> ResyncReport:
    """Put single documents right, in order with the stream."""
    if table not in mirroring.tables():
        raise FatalError(f"{table} is not captured, or not there", hint="name it as database.collection, at the source")
    with connect(_url(mirroring.source.url), application_name="cdc-sync") as source:
        beside = None if mirroring.position is None else waiting(source, mirroring.position, PATIENCE_SECONDS)
        resync = Resync(mirroring.source, mirroring.sink, table)
        return resync.run(wanted, mirroring.barrier, beside, dry_run=dry_run)


def stored_position(sink: SinkConfig) -> SourcePosition | None:
    """Where the mirror itself says that it stands; `None` if it was never filled."""
    position = MongoCopyTarget(sink).stored_position()
    return None if position is None else position.source


def ddl_capture_script(source: SourceConfig, *, remove: bool) -> str:  # noqa: ARG001 - the protocol's
    """MongoDB needs nothing."""
    raise FatalError(f"source {source.name} tells of DDL by itself", hint="see show_expanded_events")


def run_script(source: SourceConfig, script: str) -> None:
    """Nothing there is run."""


def left_at_source(source: SourceConfig) -> str:  # noqa: ARG001 - the protocol's
    """Nothing: a MongoDB server knows nothing of its readers."""
    return ""


def drop_source(source: SourceConfig) -> None:
    """There is nothing at the source that would have to go: it knows nothing of its readers."""


def drop_sink(sink: SinkConfig) -> None:
    """Forget in the target that it is our mirror; its collections and their documents stay."""
    MongoCopyTarget(sink).forget()


def waiting(source: Client, position: ReadPosition | None, patience_seconds: float) -> CatchUp:
    """A `CatchUp` that looks where the mirror stands."""

    def catch_up(moment: int) -> bool:
        if position is None:
            return False
        nudge(source)
        deadline = time.monotonic() + patience_seconds
        while time.monotonic() < deadline:
            stands = position()
            if stands is not None and has_passed(stands, encode_moment(moment)):
                return True
            time.sleep(_POLL_SECONDS)
        return False

    return catch_up


class _Verification:
    """Both sides, one collection after the other. sure: whether every difference was looked at beyond the lag."""

    def __init__(self, source: Client, target: Client, sink: SinkConfig, catch_up: CatchUp) -> None:
        self.sure = True
        self._source = source
        self._target = target
        self._sink = sink
        self._catch_up = catch_up

    def report(self, table: TableName) -> TableReport:
        started = time.monotonic()
        sides = CollectionDigest(self._source, table), CollectionDigest(self._target, self._sink.target_name(table))
        found = compare(*sides, self._catch_up, workers=self._sink.copy.workers)
        definition = self._definition(table)
        self.sure &= found.sure
        return TableReport(
            table=str(table),
            source_rows=found.source_rows,
            target_rows=found.target_rows,
            equal=found.equal and not definition,
            ranges=found.ranges,
            differing_ranges=found.differing_ranges,
            missing=_shown(found.missing),
            extra=_shown(found.extra),
            different=_shown(found.different),
            counted=found.counted,
            seconds=round(time.monotonic() - started, 3),
            changing=_shown(found.changing),
            definition=definition,
        )

    def _definition(self, table: TableName) -> tuple[str, ...]:
        """How the two are made in different ways, if that is still so when the mirror is as far as the source was."""
        found = self._differences(table)
        if found:
            self.sure &= self._catch_up(now(self._source))
            found &= self._differences(table)
        return tuple(sorted(found))

    def _differences(self, table: TableName) -> set[str]:
        left, right = describe(self._source, table), describe(self._target, self._sink.target_name(table))
        if left is None or right is None:
            return set() if left is right else {f"it is not {'at the source' if left is None else 'on the mirror'}"}
        return set(differences(left, right))


def describe(client: Client, table: TableName) -> CollectionInfo | None:
    """A collection with its indexes; `None` where there is none."""
    for found in read_collections(client, databases=[table.schema], wanted=table.__eq__):
        return CollectionInfo(found.name, found.kind, found.options, found.uuid, read_indexes(client, table))
    return None


def _left_behind(
    target: Client, sink: SinkConfig, source: SourceConfig, tables: Sequence[TableName]
) -> list[TableName]:
    """Collections that the mirror has by its own account, and the source has not."""
    states = Positions(target, MongoCopyTarget(sink).database, sink.name).collections()
    names = sorted(name for name in states.keys() - set(tables) if source.tables.match(name))
    wanted = {sink.target_name(name): name for name in names if not name.name.startswith(OWN_PREFIX)}
    databases = {name.schema for name in wanted}
    with translated_errors():
        present = read_collections(target, databases=databases, wanted=wanted.__contains__)
    return [wanted[found.name] for found in present]


def _url(url: Secret | None) -> str:
    assert url is not None, "cdc.config sees to that"
    return url.reveal()


def _shown(ids: Sequence[bytes]) -> Keys:
    return keys(ids, shown_id, MAX_KEYS)
