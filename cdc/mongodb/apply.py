"""Applies changes to a mirror: folded final states where that works, else one change after the other.

Applied again after a crash, all of it converges. Final states do by themselves. A change in source order is the whole
document, a delete, or a delta: absolute values for fields, which end as they should once all deltas after them have
been applied too. Where a delta does not fit the document it meets (that may be further), or a document meets another
one in a unique index, they are read from the source again: what follows catches up with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import bson
import structlog
from bson.raw_bson import RawBSONDocument
from pymongo.client_session import ClientSession
from pymongo.errors import OperationFailure, PyMongoError

from cdc.change import DELETE, INSERT, Change, Image, Table, TableName
from cdc.errors import PermanentError, TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, Client
from cdc.mongodb.delta import DeltaError, deletion, is_insertable, replacement, replacements, statements
from cdc.mongodb.equality import id_only, key_of
from cdc.mongodb.fold import runs
from cdc.mongodb.folded import Folded
from cdc.mongodb.positions import DURABLE
from cdc.mongodb.writes import DUPLICATE_KEY, IMMUTABLE_FIELD, Failure, Outcome, Writer
from cdc.sink import Halted, Reread, TableGone

CHUNK: Final = 1_000
"""Statements in source order that go as one command: where one did nothing, so many are looked through."""

ROUNDS: Final = 20
"""So often documents that are in each other's way are read again, before the whole batch is tried again."""

log = structlog.get_logger()


class Misfit(Exception):
    """Folded or in a transaction the changes cannot be applied: take them in source order."""


class Applier:
    """Writes changes to the collections of one target.

    target_name: where a collection of the source is mirrored to. uuid: what the source knows it by, or nothing.
    missing, healed: documents that were not there, and that were put right, since somebody set these to zero.
    """

    def __init__(
        self,
        client: Client,
        session: ClientSession,
        target_name: Callable[[TableName], TableName],
        uuid: Callable[[TableName], bytes],
        reread: Reread | None,
        *,
        transactions: bool,
        parks: bool,
    ) -> None:
        """transactions: whether the target has such. parks: whether what raises `PermanentError` is tried again."""
        self.missing = 0
        self.healed = 0
        self._again = self._halts = False
        self._client = client
        self._session = session
        self._writer = Writer(client, session)
        self._target_name = target_name
        self._uuid = uuid
        self._reread = reread
        self._transactions = transactions
        self._parks = parks

    def folded(self, work: Mapping[TableName, Folded]) -> None:
        """Write final states. Raises `Misfit` where that does not work; without a transaction some are written."""
        for table, effect in work.items():
            self._final_states(self._target_name(table), effect)

    def in_order(
        self, changes: Iterable[tuple[TableName, Change]], *, again: bool = False, halts: bool = False
    ) -> None:
        """Write changes one after the other, and resolve what fails.

        again: some of it may have been written by a try before this one: only what is healed counts as missing.
        halts: at all that meets a unique index: what it resolves is ahead of the others, and in the way of those that
            wait for nothing else, while documents that are refused stay behind.
        In a transaction nothing can be resolved: raises `Misfit`, and nothing of the transaction is left. Outside one
        raises `Halted` at what is refused.
        """
        self._again, self._halts = again, halts
        for table, run in runs(changes):
            for begin in range(0, len(run), CHUNK):
                self._run(table, run[begin : begin + CHUNK])

    def _final_states(self, target: TableName, effect: Folded) -> None:
        deletes = [deletion(id_only(key)) for key in effect.deletes]
        replaces = replacements(effect.replaces)
        inserts: list[tuple[Image, Image]] = []
        upserts: list[bytes] = []
        if self._session.in_transaction:  # which a failure would end
            upserts = replacements(effect.inserts)
        else:
            inserts = [document for document in effect.inserts if is_insertable(document[1])]
            if len(inserts) < len(effect.inserts):
                upserts = replacements(document for document in effect.inserts if not is_insertable(document[1]))
        if deletes:
            done = self._writer.delete(target, deletes, ordered=False)
            self._fits(done.failures)
            self.missing += max(effect.expected_deletes - done.n, 0)
        if replaces:
            done = self._writer.update(target, replaces, ordered=False)
            self._fits(done.failures)
            if len(replaces) == len(effect.replaces):
                self._upserted(done.upserted)
        if upserts:
            self._fits(self._writer.update(target, upserts, ordered=False).failures)
        if inserts:
            self._insert(target, inserts)
        if effect.deltas:
            self._deltas(target, effect.deltas)

    def _insert(self, target: TableName, inserts: Sequence[tuple[Image, Image]]) -> None:
        """Insert documents; those that are there, because this is a replay, are replaced."""
        failures = self._writer.insert(target, [image for _, image in inserts], ordered=False).failures
        self._fits(failure for failure in failures if failure.code not in DUPLICATE_KEY)
        again = [inserts[failure.index] for failure in failures]
        if again:
            parts = [statement for key, image in again for statement in replacement(id_only(key), image)]
            self._fits(self._writer.update(target, parts, ordered=False).failures)

    def _deltas(self, target: TableName, changes: Sequence[Change]) -> None:
        try:
            parts = [statement for change in changes for statement in _statements(change)]
        except DeltaError as exc:
            raise Misfit from exc
        done = self._writer.update(target, parts, ordered=True)
        self._fits(done.failures)
        if done.n != len(parts):
            raise Misfit

    def _upserted(self, count: int) -> None:
        self.missing += count
        self.healed += count

    @staticmethod
    def _fits(failures: Iterable[Failure]) -> None:
        for failure in failures:
            if isinstance(error := failure.error, TransientError):
                raise error
            log.debug("changes do not fit as they are folded", code=failure.code)
            raise Misfit

    # in source order

    def _run(self, table: TableName, changes: Sequence[Change]) -> None:
        """Changes of one collection that are all deletes, or none of them: as one command, if all goes well."""
        deletes = changes[0].operation == DELETE
        own = [[deletion(_id(change))] if deletes else _understood(change) for change in changes]
        at = 0
        while at < len(changes):
            end = next((n for n in range(at, len(changes)) if own[n] is None), len(changes))
            if at < end:
                at += self._together(table, changes[at:end], [parts or [] for parts in own[at:end]])
            else:
                self._one(table, changes[at])
                at += 1

    def _together(self, table: TableName, changes: Sequence[Change], own: Sequence[Sequence[bytes]]) -> int:
        """Execute each change's own statements, up to the first that fails, which is resolved; return how many."""
        target, deletes = self._target_name(table), changes[0].operation == DELETE
        parts = [part for each in own for part in each]
        owners = [index for index, each in enumerate(own) for _ in each]
        write = self._writer.delete if deletes else self._writer.update
        done = write(target, parts, ordered=True)
        if self._session.in_transaction:
            self._fits(done.failures)
            if not deletes and done.n != len(parts):
                raise Misfit
        if not self._again:
            self._count(changes, done, deletes=deletes)
        executed = done.failures[0].index if done.failures else len(parts)
        upto = owners[executed] if done.failures else len(changes)
        if not deletes and done.n < executed:  # a delta has found nothing: which?
            for change in changes[:upto]:
                self._one(table, change)
        if not done.failures:
            return upto
        self._one(table, changes[upto])
        return upto + 1

    def _count(self, changes: Sequence[Change], done: Outcome, *, deletes: bool) -> None:
        if deletes:
            self.missing += len(changes) - done.n
        elif done.upserted:
            self._upserted(max(done.upserted - sum(change.operation == INSERT for change in changes), 0))

    def _one(self, table: TableName, change: Change) -> None:
        """Apply a change by all means. Raises `Halted` where the target refuses the document itself."""
        if self._session.in_transaction:
            raise Misfit
        try:
            self._by_all_means(table, change)
        except PermanentError as exc:
            raise Halted(str(exc), hint=exc.hint, change=change) from exc

    def _by_all_means(self, table: TableName, change: Change) -> None:
        if change.operation == DELETE:
            self._settle_failure(table, change, self._delete(table, _id(change)))
            return
        try:
            parts = _statements(change)
        except DeltaError as exc:
            log.debug("delta not understood", reason=str(exc))
            self._settle(table, {key_of(_id(change)): _id(change)}, None)
            return
        done = self._writer.update(self._target_name(table), parts, ordered=True)
        failure = next(iter(done.failures), None)
        self._settle_failure(table, change, failure, missing=failure is None and done.n < len(parts))

    def _settle_failure(
        self, table: TableName, change: Change, failure: Failure | None, *, missing: bool = False
    ) -> None:
        if failure is None and not missing:
            return
        self.missing += missing
        meets_index = failure is not None and failure.code in DUPLICATE_KEY
        if failure is not None and isinstance(failure.error, TransientError):
            raise failure.error
        if failure is not None and failure.code == IMMUTABLE_FIELD and change.after is not None:
            self._replace_id(table, change)
        elif not self._halts if meets_index else change.detail is not None:
            self._settle(table, {key_of(_id(change)): _id(change)}, failure)
        else:
            assert failure is not None
            raise PermanentError(f"{table}: {failure.error}", hint=failure.error.hint)

    def _replace_id(self, table: TableName, change: Change) -> None:
        """The document is there under an `_id` that only the collection's collation takes for the same."""
        assert change.after is not None
        self._delete(table, _id(change))
        failures = self._writer.update(
            self._target_name(table), replacement(_id(change), change.after), ordered=True
        ).failures
        if failures:
            raise failures[0].error

    def _settle(self, table: TableName, keys: dict[object, Image], failure: Failure | None) -> None:
        """Make documents what they are at the source now, and those that are in their way then."""
        if self._reread is None:
            raise failure.error if failure else PermanentError(f"{table}: a document is missing")
        source = Table(table.schema, table.name, (), self._uuid(table).hex())
        before: dict[Image, Image | None] = {}
        for _ in range(ROUNDS):
            try:
                images = {key: self._reread(source, key) for key in keys.values()}
            except TableGone:
                if self._parks:  # they may have to be here for what became of it, which is yet to come
                    if failure is not None and failure.code in DUPLICATE_KEY:
                        raise
                    return
                images = dict.fromkeys(keys.values())
            # what is in the way goes first
            gone = [key for key, image in images.items() if image is None or before or len(keys) > 1]
            found = self._exchange(table, gone, images)
            if found is None:
                self.healed += len(keys)
                return
            if images == before:
                reason = found[0].error
                raise PermanentError(f"{table}: {reason}", hint="a unique index that the source does not have?")
            before = images
            keys |= self._holders(table, *found)
        raise TransientError(f"{table}: documents change at the source as fast as they are put right here")

    def _exchange(
        self, table: TableName, gone: Sequence[Image], images: Mapping[Image, Image | None]
    ) -> tuple[Failure, Image] | None:
        """Delete, then write. Where that meets a unique index nothing is changed, if the target has transactions.

        Else what is in the way of a document that is refused would be lost: its own change has come long ago.
        """
        if not self._transactions or not gone:
            self._delete_all(table, gone)
            return self._put(table, images)
        self._session.start_transaction(write_concern=DURABLE)
        try:
            self._delete_all(table, gone)
            found = self._put(table, images)
            if found is None:
                self._session.commit_transaction()
            return found
        finally:
            if self._session.in_transaction:
                with suppress(PyMongoError):
                    self._session.abort_transaction()

    def _delete_all(self, table: TableName, keys: Sequence[Image]) -> None:
        for key in keys:
            failure = self._delete(table, key)
            if failure is not None:
                raise failure.error

    def _put(self, table: TableName, images: Mapping[Image, Image | None]) -> tuple[Failure, Image] | None:
        """Write documents; the failure and the document, if one meets another in a unique index."""
        for key, image in images.items():
            if image is not None:
                for failure in self._write_one(self._target_name(table), replacement(key, image)).failures:
                    if failure.code in DUPLICATE_KEY:
                        return failure, image
                    raise failure.error
        return None

    def _write_one(self, target: TableName, parts: Sequence[bytes]) -> Outcome:
        """In a transaction servers refuse the whole command for a single statement."""
        try:
            return self._writer.update(target, parts, ordered=True)
        except OperationFailure as exc:
            if exc.code not in DUPLICATE_KEY:
                raise
            reply = exc.details.raw if isinstance(exc.details, RawBSONDocument) else bson.encode(exc.details or {})
            return Outcome(failures=[Failure(0, exc.code or 0, bytes(reply))])

    def _delete(self, table: TableName, key: Image) -> Failure | None:
        return next(iter(self._writer.delete(self._target_name(table), [deletion(key)], ordered=True).failures), None)

    def _holders(self, table: TableName, failure: Failure, image: Image | None = None) -> dict[object, Image]:
        """The documents that hold what another one would have in a unique index.

        image: that other one, where it is known; under a collation the server does not say what it would have.
        """
        pattern = walk.get_document(failure.reply, b"keyPattern")
        collation = walk.get_document(failure.reply, b"collation")
        value = walk.get_document(failure.reply, b"keyValue")
        if pattern is None or value is None:
            raise failure.error
        if collation is not None:
            if image is None:
                return {}
            value = walk.joined(_at(image, each.name) for each in walk.elements(pattern))
        parts = (
            walk.element(
                walk.DOCUMENT, each.name, walk.document(walk.element(each.kind, b"$eq", value[each.start : each.end]))
            )
            for each in walk.elements(value)
        )
        target = self._target_name(table)
        command: dict[str, object] = {
            "find": target.name,
            "filter": RawBSONDocument(walk.joined(parts)),
            "projection": {"_id": 1},
            "limit": 10,
            "singleBatch": True,
        }
        if collation is not None:
            command["collation"] = RawBSONDocument(collation)
        reply = self._client[target.schema].command(command, codec_options=RAW, session=self._session)
        cursor = walk.get_document(bytes(reply.raw), b"cursor")
        assert cursor is not None
        batch = walk.find(cursor, b"firstBatch")
        assert batch is not None
        return {key_of(key): key for key in map(id_only, walk.array_items(cursor, batch.start))}


def _at(image: Image, path: bytes) -> bytes:
    """The value at a dotted path, as an element named by the path; null where there is none."""
    value: tuple[int, bytes] = (walk.DOCUMENT, image)
    for name in path.split(b"."):
        kind, holder = value
        found = walk.find(holder, name) if kind in {walk.DOCUMENT, walk.ARRAY} else None
        if found is None:
            return walk.element(walk.NULL, path, b"")
        value = (found.kind, holder[found.start : found.end])
    return walk.element(value[0], path, value[1])


def _id(change: Change) -> Image:
    assert change.key is not None
    return id_only(change.key)


def _statements(change: Change) -> list[bytes]:
    """What does a change that is no delete, exactly: by its delta where it has one, for its image is a later one."""
    if change.detail is not None:
        return statements(_id(change), change.detail.description)  # type: ignore[union-attr]
    assert change.after is not None
    return replacement(_id(change), change.after)


def _understood(change: Change) -> list[bytes] | None:
    """The same; `None` where its delta cannot be written as statements."""
    try:
        return _statements(change)
    except DeltaError:
        return None
