"""Kinds of databases: each is a folder of this package, and this is the only place that looks for one by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Final, Protocol, cast

from cdc.change import Batch, TableName
from cdc.config import Config, SinkConfig, SourceConfig
from cdc.cutover import CutoverResult
from cdc.first_config import Script
from cdc.letter import Described
from cdc.mirroring import Mirroring
from cdc.position import SourcePosition
from cdc.preflight import Finding
from cdc.resync import ResyncReport, Wanted
from cdc.source import Facts, Source
from cdc.verify_report import VerifyReport

_SOURCES: Final = {"postgres": "PostgresSource", "mongodb": "MongoSource"}
"""The class in each folder's `source.py`."""


class Preflight(Protocol):
    """What each folder's `preflight.py` can check."""

    def check_source(self, config: Config, source: SourceConfig) -> Iterator[Finding]:
        """Look for what would keep a source from being captured. Changes nothing."""
        ...

    def check_sink(self, config: Config, sink: SinkConfig) -> Iterator[Finding]:
        """Look for what would keep a mirror of that kind from being written. Changes nothing."""
        ...


class Pair(Protocol):
    """What each folder's `pair.py` does with a source and its mirror of the same kind."""

    def verify_pair(self, mirroring: Mirroring) -> VerifyReport:
        """Compare all captured tables."""
        ...

    def cut_over_pair(
        self, mirroring: Mirroring, *, timeout_seconds: float, progress: Callable[[str], None]
    ) -> CutoverResult:
        """Make the mirror the database to write to."""
        ...

    def resync_pair(self, mirroring: Mirroring, table: TableName, wanted: Wanted, *, dry_run: bool) -> ResyncReport:
        """Put single rows right, in order with the stream."""
        ...

    def stored_position(self, sink: SinkConfig) -> SourcePosition | None:
        """Where the mirror itself says that it stands; `None` if it was never filled."""
        ...

    def ddl_capture_script(self, source: SourceConfig, *, remove: bool) -> str:
        """What makes a source tell of each DDL in its place, or removes that; for its administrator to read or run.

        Raises `FatalError` where that kind tells by itself.
        """
        ...

    def run_script(self, source: SourceConfig, script: str) -> None:
        """Run such a script. Raises `FatalError` where the role of the source's URL may not."""
        ...

    def left_at_source(self, source: SourceConfig) -> str:
        """What `drop_source` removes, for people; empty where the source's server knows nothing of us."""
        ...

    def drop_source(self, source: SourceConfig) -> None:
        """Remove from the source's server what was made there for us."""
        ...

    def drop_sink(self, sink: SinkConfig) -> None:
        """Forget in the target that it is our mirror; what is in it stays."""
        ...


class Onboarding(Protocol):
    """What each folder's `onboarding.py` tells `cdc init`."""

    def contents(self, url: str) -> dict[str, int]:
        """Schemas or databases, and how much in each can be captured."""
        ...

    def source_role(self, config: Config, source: SourceConfig, role: str) -> Script:
        """A script for an administrator of the source: the role, and what capturing needs."""
        ...

    def mirror_role(self, sink: SinkConfig, role: str) -> Script:
        """The same for a mirror."""
        ...


def pair(kind: str) -> Pair:
    """The commands on a source and a mirror of one kind."""
    return cast("Pair", import_module(f"cdc.{kind}.pair"))


def describe(kind: str, batch: Batch) -> Described:
    """The only change of a batch, as the kind's `describe.py` tells it."""
    return cast("Callable[[Batch], Described]", import_module(f"cdc.{kind}.describe").describe)(batch)


def build_source(config: Config, source: SourceConfig, facts: Facts) -> Source:
    """The source of a configuration; its URL tells its kind."""
    found = getattr(import_module(f"cdc.{source.kind}.source"), _SOURCES[source.kind])
    return cast("Callable[[Config, SourceConfig, Facts], Source]", found)(config, source, facts)


def check_url(kind: str, url: str) -> None:
    """Take an URL apart as its kind does, asking nobody. Raises `FatalError`, which quotes nothing of it."""
    import_module(f"cdc.{kind}.url").parsed(url)


def preflight(kind: str) -> Preflight:
    """The checks of a kind."""
    return cast("Preflight", import_module(f"cdc.{kind}.preflight"))


def onboarding(kind: str) -> Onboarding:
    """What `cdc init` asks of a kind."""
    return cast("Onboarding", import_module(f"cdc.{kind}.onboarding"))
