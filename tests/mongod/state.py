"""Everything that the server knows: the catalogue, the oplog, sessions, cursors, fail points and its role."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .cursors import Cursor
from .errors import CommandError
from .fail_points import FailPoints
from .keys import Key
from .oplog import Entry, Oplog
from .storage import Catalog, Collection, check_namespace
from .versions import Version

if TYPE_CHECKING:
    from .sessions import Session, Transaction
    from .wire import Message

BULK_FIELDS = {"insert": b"documents", "update": b"updates", "delete": b"deletes"}


@dataclass(slots=True)
class Settings:
    """The process's options."""

    version: Version
    standalone: bool = False
    oplog_size: int = 1_000_000
    max_event_bytes: int = 16 * 1024 * 1024 + 16 * 1024
    noop_seconds: float = 10.0
    set_name: str = "rs0"


class State:
    """One server."""

    def __init__(self, settings: Settings) -> None:
        self.version = settings.version
        self.settings = settings
        self.standalone = settings.standalone
        self.max_event_bytes = settings.max_event_bytes
        self.catalog = Catalog()
        self.oplog = Oplog(settings.oplog_size)
        self.sessions: dict[bytes, Session] = {}
        self.cursors: dict[int, Cursor] = {}
        self.fail_points = FailPoints()
        self.locks: dict[tuple[bytes, Key], Transaction] = {}
        """What open transactions have written, and nobody else may write."""

        self.open_transactions: set[Transaction] = set()
        self.modified: dict[tuple[bytes, Key], int] = {}
        """When documents were written last; kept only while a transaction is open."""

        self.address = ("127.0.0.1", 0)
        self.primary = True
        self.topology_counter = 6
        self.topology_changed = asyncio.Event()
        self.started = time.monotonic()
        self.blackout: asyncio.Future[float] | None = None

    @staticmethod
    def loop_time() -> float:
        """A clock for time-outs."""
        return time.monotonic()

    @property
    def host(self) -> str:
        """Address as members of a replica set know each other."""
        return f"{self.address[0]}:{self.address[1]}"

    def collection_for_write(self, db: str, name: str) -> Collection:
        """The collection, created if it is not there, as writes do it."""
        found = self.catalog.get(db, name)
        if found is not None:
            if "viewOn" in found.settings:
                raise CommandError(166, f"Namespace {db}.{name} is a view, not a collection")
            return found
        check_namespace(db, name)
        return self.create(Collection(db, name))

    def create(self, collection: Collection) -> Collection:
        """Add a collection and tell the change streams."""
        from .catalog import create_entry  # noqa: PLC0415 - the commands know the events

        self.catalog.add(collection)
        self.oplog.append([create_entry(collection)])
        return collection

    def record(self, entry: Entry, collection: Collection, key: Key) -> None:
        """Write one change outside of transactions to the oplog."""
        if "timeseries" in collection.settings or self.standalone:
            self.oplog.tick()
        else:
            self.oplog.append([entry])
        if self.open_transactions:
            self.modified[collection.uuid, key] = self.oplog.last_timestamp

    def set_primary(self, primary: bool) -> None:
        """Change roles: monitors that wait in hello are answered at once."""
        self.primary = primary
        self.topology_counter += 1
        self.topology_changed.set()
        self.topology_changed = asyncio.Event()
        if not primary:
            self.kill_cursors(11602, "operation was interrupted because the node stepped down")
            for transaction in list(self.open_transactions):
                transaction.abort(self)

    def kill_cursors(self, code: int, message: str) -> None:
        """Close all cursors; getMores that wait are answered with the error."""
        for cursor in self.cursors.values():
            cursor.killed = (code, message)
        self.cursors.clear()
        self.oplog.wake()


@dataclass(slots=True)
class Connection:
    """What is known of a client's connection."""

    id: int
    app_name: str = ""


@dataclass(slots=True)
class Request:
    """One command."""

    name: str
    db: str
    body: dict[str, Any]
    """The fields but for bulk documents, as Python values."""

    raw: bytes
    message: Message
    connection: Connection
    session: Session | None = None
    transaction: Transaction | None = None
    retryable: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def collection(self) -> str:
        """The collection that the command names first."""
        name = self.body[self.name]
        if not isinstance(name, str):
            raise CommandError(73, f"collection name has invalid type for {self.name}")
        return name
