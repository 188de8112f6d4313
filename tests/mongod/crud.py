"""Commands that write documents: insert, update, delete, findAndModify."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import raw
from .errors import CommandError
from .projections import project
from .queries import Query, sort_documents
from .sessions import Outcome
from .state import BULK_FIELDS, Request, State
from .storage import Collection
from .updates import Update
from .writes import Blocked, Target, upsert_document


@dataclass(slots=True)
class _Totals:
    n: int = 0
    modified: int = 0
    upserted: list[bytes] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    retried: list[int] = field(default_factory=list)

    def add(self, index: int, outcome: Outcome) -> None:
        self.n += outcome.n
        self.modified += outcome.modified
        if outcome.upserted is not None:
            parts = raw.fields({"index": index}) + raw.element(b"_id", *outcome.upserted)
            self.upserted.append(raw.wrap(parts))


def _target(state: State, request: Request) -> Target:
    collection = state.collection_for_write(request.db, request.collection)
    return Target(state, collection, request.transaction, validate=not request.body.get("bypassDocumentValidation"))


def _existing_target(state: State, request: Request) -> Target:
    """Without creating a collection for writes that change nothing."""
    found = state.catalog.get(request.db, request.collection) or Collection(request.db, request.collection)
    return Target(state, found, request.transaction, validate=not request.body.get("bypassDocumentValidation"))


def _statements(request: Request) -> list[bytes]:
    name = BULK_FIELDS[request.name]
    if name in request.message.sequences:
        found = request.message.sequences[name]
    else:
        value = raw.find_value(request.raw, name)
        if value is None or value[0] != raw.ARRAY:
            raise CommandError(40414, f"BSON field '{request.name}.{name.decode()}' is missing but a required field")
        found = raw.array_documents(value[1])
    if not 1 <= len(found) <= 100_000:
        raise CommandError(16, f"Write batch sizes must be between 1 and 100000. Got {len(found)} operations.")
    return found


async def _run(request: Request, statements: list[bytes], execute: Callable[[bytes], Outcome]) -> _Totals:
    """Execute statements one by one; those of a retried write that were executed before are only counted."""
    totals = _Totals()
    ordered = request.body.get("ordered", True)
    numbers = request.body.get("stmtIds")
    executed = request.session.executed if request.retryable and request.session else {}
    for index, statement in enumerate(statements):
        number = numbers[index] if numbers else int(request.body.get("stmtId", 0)) + index
        outcome = executed.get(number)
        if outcome is not None:
            totals.retried.append(number)
            totals.add(index, outcome)
            continue
        try:
            outcome = await _unblocked(execute, statement)
        except CommandError as exc:
            if request.transaction is not None:
                raise
            totals.errors.append({"index": index, "code": exc.code, **exc.extra, "errmsg": exc.errmsg})
            if ordered:
                break
            continue
        if request.retryable:
            executed[number] = outcome
        totals.add(index, outcome)
    return totals


async def _unblocked(execute: Callable[[bytes], Outcome], statement: bytes) -> Outcome:
    while True:
        try:
            return execute(statement)
        except Blocked as exc:
            await exc.holder.finished.wait()


def _reply(totals: _Totals, *, modified: bool = False) -> bytes:
    parts = raw.fields({"n": totals.n})
    if totals.upserted:
        parts += raw.element(b"upserted", raw.ARRAY, raw.document_array(totals.upserted))
    if modified:
        parts += raw.fields({"nModified": totals.modified})
    if totals.errors:
        parts += raw.fields({"writeErrors": totals.errors})
    if totals.retried:
        parts += raw.fields({"retriedStmtIds": totals.retried})
    return parts


async def insert(state: State, request: Request) -> bytes:
    """`insert`: documents are kept as they came."""
    statements = _statements(request)
    target = _target(state, request)

    def execute(document: bytes) -> Outcome:
        target.insert(document)
        return Outcome(n=1)

    return _reply(await _run(request, statements, execute))


async def update(state: State, request: Request) -> bytes:
    """`update`."""
    statements = _statements(request)
    creates = any(b"\x08upsert\0\x01" in statement for statement in statements)
    target = _target(state, request) if creates else _existing_target(state, request)
    totals = await _run(request, statements, lambda statement: _update_one(target, statement))
    return _reply(totals, modified=True)


def _update_one(target: Target, statement: bytes) -> Outcome:
    condition, update_value, options = _parse_update(statement)
    query = Query(condition, target.collection)
    update_ = Update(*update_value, query.decoded, options.get("arrayFilters") or [])
    multi = bool(options.get("multi"))
    if multi and update_.is_replacement:
        raise CommandError(9, "multi update is not supported for replacement-style update")
    outcome = Outcome()
    found = list(query.select(target.overlay)) if multi else list(itertools.islice(query.select(target.overlay), 1))
    target.require_free(key for key, _ in found)
    for key, before in found:
        outcome.n += 1
        outcome.modified += target.update(key, before, update_.apply(before))
    if not outcome.n and options.get("upsert"):
        outcome.n = 1
        outcome.upserted = target.insert(upsert_document(query, condition, update_))
    return outcome


def _parse_update(statement: bytes) -> tuple[bytes, raw.Value, dict[str, Any]]:
    condition = raw.EMPTY
    update_value: raw.Value | None = None
    rest = []
    for name, kind, payload in raw.elements(statement):
        if name == b"q":
            condition = payload
        elif name == b"u":
            update_value = (kind, payload)
        else:
            rest.append((name, kind, payload))
    if update_value is None or update_value[0] not in {raw.OBJECT, raw.ARRAY}:
        raise CommandError(9, "Update argument must be either an object or an array")
    return condition, update_value, raw.decode(raw.document(rest))


async def delete(state: State, request: Request) -> bytes:
    """`delete`."""
    target = _existing_target(state, request)

    def execute(statement: bytes) -> Outcome:
        condition = raw.find_value(statement, b"q") or (raw.OBJECT, raw.EMPTY)
        limit = raw.find_value(statement, b"limit")
        only_one = limit is not None and raw.decode_value(limit) == 1
        selected = Query(condition[1], target.collection).select(target.overlay)
        outcome = Outcome()
        found = list(itertools.islice(selected, 1 if only_one else None))
        target.require_free(key for key, _ in found)
        for key, before in found:
            target.delete(key, before)
            outcome.n += 1
        return outcome

    return _reply(await _run(request, _statements(request), execute))


async def find_and_modify(state: State, request: Request) -> bytes:
    """`findAndModify`."""
    session = request.session
    if request.retryable and session and 0 in session.executed:
        return (session.executed[0].reply or b"") + raw.fields({"retriedStmtId": 0})
    creates = bool(request.body.get("upsert"))
    target = _target(state, request) if creates else _existing_target(state, request)
    outcome = await _unblocked(lambda _: Outcome(reply=_find_and_modify(target, request)), b"")
    if request.retryable and session:
        session.executed[0] = outcome
    return outcome.reply or b""


def _find_and_modify(target: Target, request: Request) -> bytes:
    body = request.body
    condition = raw.find_value(request.raw, b"query") or (raw.OBJECT, raw.EMPTY)
    query = Query(condition[1], target.collection)
    found = _first(target, query, body.get("sort"))
    key_and_before = (
        None if found is None else (target.collection.key(raw.find_value(found, b"_id") or raw.NULL_VALUE), found)
    )
    if body.get("remove"):
        if key_and_before is not None:
            target.delete(*key_and_before)
        return _found_reply({"n": int(found is not None)}, b"", found, body)
    value = raw.find_value(request.raw, b"update")
    if value is None:
        raise CommandError(9, "Either an update or remove=true must be specified")
    update_ = Update(*value, query.decoded, body.get("arrayFilters") or [])
    if key_and_before is not None:
        change = update_.apply(key_and_before[1])
        target.update(*key_and_before, change)
        shown = change.document if body.get("new") else key_and_before[1]
        return _found_reply({"n": 1, "updatedExisting": True}, b"", shown, body)
    if not body.get("upsert"):
        return _found_reply({"n": 0, "updatedExisting": False}, b"", None, body)
    inserted = target.insert(upsert_document(query, condition[1], update_))
    shown_new = target.get(target.collection.key(inserted)) if body.get("new") else None
    extra = raw.element(b"upserted", *inserted)
    return _found_reply({"n": 1, "updatedExisting": False}, extra, shown_new, body)


def _first(target: Target, query: Query, order: dict[str, Any] | None) -> bytes | None:
    selected = (document for _, document in query.select(target.overlay))
    if not order:
        return next(selected, None)
    return next(iter(sort_documents(list(selected), order)), None)


def _found_reply(last: dict[str, Any], extra: bytes, shown: bytes | None, body: dict[str, Any]) -> bytes:
    parts = raw.element(b"lastErrorObject", raw.OBJECT, raw.wrap(raw.fields(last) + extra))
    if shown is None:
        return parts + raw.element(b"value", raw.NULL, b"")
    return parts + raw.element(b"value", raw.OBJECT, project(shown, body.get("fields") or {}))
