"""Sessions: retryable writes, whose results are remembered, and transactions, whose writes are buffered.

A transaction sees its own writes over what is committed *now* (read committed, not a snapshot), but it cannot overwrite
what was committed since it began: that is a WriteConflict, as on a server.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field

from . import raw
from .errors import CommandError
from .keys import Key
from .oplog import Entry
from .state import Request, State
from .storage import Collection, Overlay

_USER_DIGEST = hashlib.sha256(b"").digest()
"""The digest of "no user", as servers without authentication give it in `lsid.uid`."""


@dataclass(slots=True)
class Outcome:
    """What one statement of a retryable write did."""

    n: int = 0
    modified: int = 0
    upserted: raw.Value | None = None
    reply: bytes | None = None
    """The whole reply of a findAndModify."""


@dataclass(eq=False, slots=True)
class Transaction:
    """A transaction that is open, or how it ended."""

    number: int
    lsid: bytes
    started_at: int
    status: str = "open"
    overlays: dict[bytes, Overlay] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    def overlay(self, collection: Collection) -> Overlay:
        """The transaction's own view of a collection."""
        return self.overlays.setdefault(collection.uuid, {})

    def claim(self, state: State, collection: Collection, key: Key) -> None:
        """Lock a document; `CommandError` 112 if another transaction has it or it was changed since the start."""
        place = (collection.uuid, key)
        holder = state.locks.get(place)
        if (holder is not None and holder is not self) or state.modified.get(place, 0) > self.started_at:
            raise CommandError(
                112,
                "WriteConflict error: this operation conflicted with another operation. Please retry your operation or "
                "multi-document transaction.",
            )
        state.locks[place] = self

    def commit(self, state: State) -> None:
        """Make all writes visible at once, with one cluster time."""
        self._finish(state, "committed")
        for uuid, overlay in self.overlays.items():
            collection = state.catalog.by_uuid.get(uuid)
            if collection is None:
                continue
            for key, document in overlay.items():
                _write(collection, key, document)
                if state.open_transactions:
                    state.modified[uuid, key] = state.oplog.last_timestamp + 1
        identity = raw.element(b"txnNumber", raw.INT64, raw.pack_int64(self.number)) + raw.element(
            b"lsid", raw.OBJECT, self.lsid
        )
        for entry in self.entries:
            entry.transaction = identity
        if self.entries:
            state.oplog.append(self.entries)

    def abort(self, state: State) -> None:
        """Forget all writes."""
        self._finish(state, "aborted")

    def _finish(self, state: State, status: str) -> None:
        self.status = status
        for place in [place for place, holder in state.locks.items() if holder is self]:
            del state.locks[place]
        state.open_transactions.discard(self)
        if not state.open_transactions:
            state.modified.clear()
        self.finished.set()


def _write(collection: Collection, key: Key, document: bytes | None) -> None:
    if document is not None:
        collection.put(key, document)
    elif key in collection.documents:
        collection.remove(key)


@dataclass(slots=True)
class Session:
    """A logical session."""

    lsid: bytes
    txn_number: int = -1
    executed: dict[int, Outcome] = field(default_factory=dict)
    transaction: Transaction | None = None

    def begin(self, number: int) -> None:
        """Move on to a number; `CommandError` 225 if a later one was seen already."""
        if number < self.txn_number:
            raise CommandError(
                225,
                f"Retryable write with txnNumber {number} is prohibited on session because a newer retryable write "
                f"with txnNumber {self.txn_number} has already started on this session.",
            )
        if number > self.txn_number:
            self.txn_number = number
            self.executed = {}


def attach(state: State, request: Request) -> None:
    """Find the session of a command, and what `txnNumber`, `autocommit` and `startTransaction` say about it."""
    body = request.body
    lsid = body.get("lsid")
    if not isinstance(lsid, dict) or "id" not in lsid:
        return
    identity = bytes(lsid["id"])
    session = state.sessions.get(identity)
    if session is None:
        full = raw.wrap(
            raw.element(b"id", raw.BINARY, b"\x10\0\0\0\x04" + identity)
            + raw.element(b"uid", raw.BINARY, b"\x20\0\0\0\0" + _USER_DIGEST)
        )
        session = state.sessions[identity] = Session(full)
    request.session = session
    if "txnNumber" not in body:
        return
    if state.standalone:
        raise CommandError(20, "Transaction numbers are only allowed on a replica set member or mongos")
    number = int(body["txnNumber"])
    if body.get("autocommit") is None:
        session.begin(number)
        request.retryable = True
        return
    _attach_transaction(state, request, session, number)


def _attach_transaction(state: State, request: Request, session: Session, number: int) -> None:
    if request.body.get("startTransaction"):
        if number <= session.txn_number:
            raise CommandError(225, f"Cannot start transaction {number} on session: it has number {session.txn_number}")
        if session.transaction is not None and session.transaction.status == "open":
            session.transaction.abort(state)
        session.begin(number)
        session.transaction = Transaction(number, session.lsid, state.oplog.last_timestamp)
        state.open_transactions.add(session.transaction)
    current = session.transaction
    if current is None or current.number != number:
        raise CommandError(
            251, f"Given transaction number {number} does not match any in-progress transactions.",
            labels=("TransientTransactionError",),
        )  # fmt: skip
    request.transaction = current
    if request.name not in {"commitTransaction", "abortTransaction"} and current.status != "open":
        code = 256 if current.status == "committed" else 251
        raise CommandError(code, f"Transaction with {{ txnNumber: {number} }} has been {current.status}.")


async def commit(state: State, request: Request) -> bytes:
    """`commitTransaction`; may be repeated."""
    transaction = _current(request)
    if transaction.status == "aborted":
        raise CommandError(251, f"Transaction {transaction.number} has been aborted.")
    if transaction.status == "open":
        transaction.commit(state)
    return b""


async def abort(state: State, request: Request) -> bytes:
    """`abortTransaction`."""
    transaction = _current(request)
    if transaction.status == "committed":
        raise CommandError(256, f"Transaction {transaction.number} has been committed.")
    if transaction.status == "aborted":
        raise CommandError(251, f"Transaction {transaction.number} has been aborted.")
    transaction.abort(state)
    return b""


def _current(request: Request) -> Transaction:
    if request.transaction is None:
        raise CommandError(251, "no transaction is in progress")
    return request.transaction


async def end(state: State, request: Request) -> bytes:
    """`endSessions`: open transactions are aborted."""
    for lsid in request.body["endSessions"]:
        session = state.sessions.pop(bytes(lsid["id"]), None)
        if session and session.transaction and session.transaction.status == "open":
            session.transaction.abort(state)
    return b""


async def kill(state: State, request: Request) -> bytes:
    """`killSessions`: open transactions are aborted."""
    for lsid in request.body["killSessions"]:
        session = state.sessions.get(bytes(lsid["id"]))
        if session and session.transaction and session.transaction.status == "open":
            session.transaction.abort(state)
    return b""
