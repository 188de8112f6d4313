"""What all writers of a feed do alike: take the lock, number what comes, keep position and states with it."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Protocol

import msgspec

from cdc.errors import FatalError, TransientError
from cdc.failpoints import failpoint
from cdc.feed.beside import Beside
from cdc.feed.cache import Key, StateCache
from cdc.feed.place import Place
from cdc.feed.record import EntityState, Record, numbered
from cdc.position import Position, format_position

_DAMAGED: Final = "were its tables changed or restored in part? a feed under another name begins anew"


class Locked(msgspec.Struct, frozen=True):
    """What a session finds when it has the lock.

    head: the last id given. recorded_at: when it was recorded. now: the store's clock. All times in microseconds.
    position: of the source. resolution: of the times that the store can keep.
    """

    head: int
    recorded_at: int
    now: int
    position: Position | None
    resolution: int = 1


class Session(Protocol):
    """One connection to a store: in this stores differ. Used by one thread at a time; raises `CdcError`s."""

    def alive(self) -> bool:
        """Whether the store answers on this connection."""
        ...

    def take_over(self, source: str) -> Position | None:
        """The stored position of a source, whose writer this is from its first `lock` on."""
        ...

    def lock(self, source: str) -> Locked:
        """Begin a transaction, and take the lock, which ends with it. Waits for it `LOCK_SECONDS` at most."""
        ...

    def states(self, source: str, keys: Sequence[Key]) -> Sequence[EntityState]:
        """Those of the states that are there."""
        ...

    def existing(self, source: str, positions: Sequence[str]) -> set[str]:
        """Those of the positions of which there are records."""
        ...

    def encoded(self, records: Sequence[Record]) -> Any:
        """What `insert` takes: records in the form of the store. Does not use the connection."""
        ...

    def insert(self, encoded: Any, first_id: int, recorded_at: int) -> bool:
        """Insert records, numbered from an id on; False, and none is there, if (source, position) of one was before.

        A store whose transaction ends with that raises `TransientError`, and looks first the next time.
        """
        ...

    def put_states(self, source: str, states: Sequence[EntityState], *, new: bool = False) -> None:
        """Insert or replace states; no key comes twice. new: there are none yet, and nothing is to be replaced."""
        ...

    def move(self, source: str, position: Position) -> None:
        """Store a position."""
        ...

    def commit(self, head: int, recorded_at: int) -> None:
        """Store both, commit durably, and wake the readers."""
        ...

    def rollback(self) -> None:
        """End the transaction without effect."""
        ...

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """As `FeedWriter.prune`."""
        ...

    def entity_types(self) -> Sequence[str]:
        """As `FeedWriter.entity_types`."""
        ...

    def forget(self, source: str) -> None:
        """Remove a source's position, and `EntityState.known` of its entities. Durable."""
        ...

    def close(self) -> None:
        """Disconnect; an open transaction ends without effect. Raises nothing."""
        ...


class _Appended(msgspec.Struct, frozen=True):
    """What goes into a store at once. absent: keys of states of which there are none yet."""

    records: Sequence[Record]
    encoded: Any
    latest: Mapping[Key, EntityState]
    absent: Set[Key]


_NOTHING: Final = _Appended((), None, {}, frozenset())


class StoreWriter(ABC):
    """`cdc.feed.store.FeedWriter` over the sessions of a store.

    What a source writes has a session of its own; publishing and pruning, which other threads may do, share another.
    A server takes what was appended while the caller makes what comes next, which has to know its states by then: so
    each piece waits until those of its successor were read. All work of the interpreter is the caller's: two threads
    that both want it wait for each other.
    """

    is_remote = True
    """Whether a server does the work. Where it is done here, for every row the interpreter is given away, and comes
    back late if another thread wants it."""

    def __init__(self, place: Place, source: str) -> None:
        self._place = place
        self._source = source
        self._position: Position | None = None
        self._session: Session | None = None
        self._turn: _Turn | None = None
        self._cache = StateCache()
        self._absent: Set[Key] = frozenset()  # were asked for last, and are not there
        self._unwritten = _NOTHING
        self._writing = Beside(f"write:{source}")
        self._other: Session | None = None
        self._other_lock = threading.Lock()

    @abstractmethod
    def _connect(self) -> Session:
        """Connect; create or migrate what is missing."""

    def open(self) -> Position | None:
        """Connect, create or migrate the tables, and return this source's position; `None` if it has none."""
        self._leave()
        self._session = self._connect()
        with self._leaving_on_error():
            self._position = self._session.take_over(self._source)
        return self._position

    def begin(self, position: Position) -> None:
        """Store the position at which this source begins. Durable."""
        with self._leaving_on_error():
            session, turn = self._begun()
            session.move(self._source, position)
            session.commit(turn.head, turn.recorded_at)
        self._turn, self._position = None, position

    def states(self, keys: Collection[Key]) -> Mapping[Key, EntityState]:
        """What is known of entities of this source; the first call of a transaction takes the lock."""
        with self._leaving_on_error():
            self._writing.wait()
            session, _ = self._begun()
            found, missing = self._cache.find(keys)
            unwritten = self._unwritten.latest  # which the cache need not have any more
            found.update({key: unwritten[key] for key in missing if key in unwritten})
            if missing := [key for key in missing if key not in unwritten]:
                read = session.states(self._source, missing)
                found.update({(state.entity_type, state.key): state for state in read})
                self._cache.put(read)
            self._absent = set(missing) - found.keys()
            self._begin_to_write()
        return found

    def known(self, positions: Collection[str]) -> Collection[str]:
        """Those of the positions of which this source has records."""
        with self._leaving_on_error():
            session, _ = self._written()
            return session.existing(self._source, list(positions))

    def append(self, records: Sequence[Record], states: Sequence[EntityState]) -> None:
        """Add records, in order, in the open transaction, without those that are there; replace states."""
        latest = {(state.entity_type, state.key): state for state in states}
        absent, self._absent = self._absent, frozenset()
        with self._leaving_on_error():
            session, _ = self._begun()
            encoded = session.encoded(records) if records else None
            self._begin_to_write()
            self._unwritten = _Appended(records, encoded, latest, absent)
            self._cache.put(latest.values())
            if not self.is_remote:
                self._written()

    def commit(self, position: Position) -> None:
        """Make all that was appended visible at once, durably, together with the position; wake the readers."""
        with self._leaving_on_error():
            session, turn = self._written()
            session.move(self._source, position)
            failpoint("target.commit.before")
            session.commit(turn.head, turn.recorded_at)
            failpoint("target.commit.after")
        self._turn, self._position = None, position

    def publish(self, record: Record) -> Record | None:
        """Store one record with the next version of its entity; `None` if its (source, position) is there already."""
        source, key = record.source, (record.entity_type, record.entity_id)
        with self._beside() as session:
            turn = _Turn(session.lock(source))
            if session.existing(source, [record.position]):
                session.rollback()
                return None
            version = 1 + max((state.version for state in session.states(source, [key])), default=0)
            record = msgspec.structs.replace(record, version=version)
            if not turn.insert(session, 1, session.encoded([record])):
                raise FatalError("the feed refuses what it does not have", hint=_DAMAGED)
            (stored,) = numbered([record], turn.head, turn.recorded_at)
            session.put_states(source, [_published(stored)])
            session.commit(stored.id, stored.recorded_at)
        return stored

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """Remove at most `rows` records older than that, and note it."""
        with self._beside() as session:
            return session.prune(entity_type, recorded_before, rows, sources)

    def entity_types(self) -> Sequence[str]:
        """All types of which there are records."""
        with self._beside() as session:
            return session.entity_types()

    def forget(self) -> None:
        """Remove this source's position, and the documents that are known; what it wrote stays."""
        with self._beside() as session:
            session.forget(self._source)
        self._position = None

    def close(self) -> None:
        """Disconnect; what was not committed is rolled back. Safe to call twice."""
        self._leave()
        with self._other_lock:
            if self._other is not None:
                self._other.close()
            self._other = None

    def _begun(self) -> tuple[Session, _Turn]:
        """The open transaction, or a new one."""
        if self._session is None:
            raise TransientError(f"the feed is not open for {self._source}")
        if self._turn is None:
            locked = self._session.lock(self._source)
            if locked.position != self._position:
                stands = " not ".join(f"at {_text(each)}," for each in (locked.position, self._position))
                raise TransientError(f"the feed has {self._source} {stands} someone else wrote there")
            self._turn = _Turn(locked)
        return self._session, self._turn

    def _begin_to_write(self) -> None:
        """Let the store take what was appended, while its session is not needed otherwise."""
        unwritten, self._unwritten = self._unwritten, _NOTHING
        if unwritten is not _NOTHING:
            self._writing.begin(partial(self._write, *self._begun(), unwritten))

    def _written(self) -> tuple[Session, _Turn]:
        """The open transaction, or a new one, with all that was appended."""
        self._writing.wait()
        session, turn = self._begun()
        unwritten, self._unwritten = self._unwritten, _NOTHING
        self._write(session, turn, unwritten)
        return session, turn

    def _write(self, session: Session, turn: _Turn, appended: _Appended) -> None:
        records, latest, absent = appended.records, appended.latest, appended.absent
        if records and not turn.insert(session, len(records), appended.encoded):
            new = self._new(session, records)
            if new and not turn.insert(session, len(new), session.encoded(new)):
                raise FatalError(f"the feed refuses what it does not have of {self._source}", hint=_DAMAGED)
        for is_new in (True, False):
            if some := [state for key, state in latest.items() if (key in absent) is is_new]:
                session.put_states(self._source, some, new=is_new)

    def _new(self, session: Session, records: Sequence[Record]) -> list[Record]:
        """Those that are not there yet, each once."""
        seen = session.existing(self._source, [record.position for record in records])
        # not there, and not added to what was seen before either
        return [each for each in records if each.position not in seen and not seen.add(each.position)]  # type: ignore[func-returns-value]

    @contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        """After an error nobody knows what the transaction holds: it ends, and `open` must come next."""
        try:
            yield
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        self._writing.end()
        self._unwritten = _NOTHING
        if self._session is not None:
            self._session.close()
        self._session = self._turn = self._position = None
        self._absent = frozenset()
        self._cache.clear()

    @contextmanager
    def _beside(self) -> Iterator[Session]:
        """The session that is not the source's; connected anew where the store was away."""
        with self._other_lock:
            if self._other is not None and not self._other.alive():
                self._other.close()
                self._other = None
            if self._other is None:
                self._other = self._connect()
            try:
                yield self._other
            except BaseException:
                self._other.close()
                self._other = None
                raise


class _Turn:
    """A transaction that has the lock: which id comes next, and what time it is."""

    def __init__(self, locked: Locked) -> None:
        self.head = locked.head
        self.recorded_at = locked.recorded_at
        self._locked = locked
        self._began = time.monotonic_ns()

    def insert(self, session: Session, count: int, encoded: Any) -> bool:
        """Number and insert records; False, and nothing has happened, if one is there already.

        The clock never goes back, whatever the store's does.
        """
        now = self._locked.now + (time.monotonic_ns() - self._began) // 1000
        recorded_at = max(self.recorded_at, now - now % self._locked.resolution)
        if not session.insert(encoded, self.head + 1, recorded_at):
            return False
        self.head, self.recorded_at = self.head + count, recorded_at
        return True


def _published(record: Record) -> EntityState:
    """What is kept of an entity that was published."""
    return EntityState(
        entity_type=record.entity_type,
        key=record.entity_id,
        version=record.version,
        location_id=record.location_id,
        scope=record.scope_after,
    )


def _text(position: Position | None) -> str | None:
    return format_position(None if position is None else position.source)
