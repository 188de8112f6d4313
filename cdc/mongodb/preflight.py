"""Whether a MongoDB deployment is ready to be captured from: every obstacle, each with its fix. Changes nothing.

The mirror's side is in `cdc.mongodb.preflight_sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Final

import bson
import msgspec
from bson.int64 import Int64
from pymongo.errors import OperationFailure

from cdc.config import Config, SourceConfig
from cdc.errors import TransientError
from cdc.mongodb.client import RAW, Client, connect, translated_errors
from cdc.mongodb.collections import CollectionInfo, read_collections
from cdc.mongodb.deployment import STALLED_SECONDS, Deployment, is_full, majority_delay, read_deployment
from cdc.mongodb.preflight_sink import check_sink
from cdc.mongodb.scope import Scope, scope_of
from cdc.mongodb.stream import stream_options, stream_pipeline
from cdc.preflight import Finding, check_globs, guard

__all__ = ["check_sink", "check_source"]

SHORT_OPLOG_SECONDS: Final = 24 * 3600
"""A weekend has more, a night less: what is stopped for longer than the oplog reaches must be copied again."""

_SERVER_SELECTION: Final = {"serverSelectionTimeoutMS": 5000}
_SHOWN: Final = 5


class _View(msgspec.Struct, frozen=True):
    """What the checks look at. collections: all that the globs match, views and time series too."""

    source: SourceConfig
    scope: Scope
    client: Client
    hello: Mapping[str, Any]
    deployment: Deployment
    collections: Sequence[CollectionInfo]


def check_source(config: Config, source: SourceConfig) -> Iterator[Finding]:
    """Yield what is in order and what is not. Raises `CdcError` where the server cannot be asked at all."""
    assert source.url is not None
    with closing(connect(source.url.reveal(), application_name="cdc check", **_SERVER_SELECTION)) as client:
        hello, deployment = ask(client)
        what = "sharded cluster" if deployment.sharded else f"replica set {deployment.set_name}"
        yield Finding("ok", "server", f"MongoDB {'.'.join(map(str, deployment.version))}, {what}")
        view = _View(source, scope_of(config, source), client, hello, deployment, ())
        view = msgspec.structs.replace(view, collections=_matching(view))
        for subject, check in _CHECKS.items():
            yield from guard(subject, check(view))


def ask(client: Client) -> tuple[Mapping[str, Any], Deployment]:
    """The answer to `hello`, and what it means. Raises `FatalError` for a standalone."""
    with translated_errors():
        hello = bson.decode(client.admin.command("hello", codec_options=RAW).raw)
        build_info = client.admin.command("buildInfo", codec_options=RAW)
    return hello, read_deployment(hello, build_info, None)


def _matching(view: _View) -> list[CollectionInfo]:
    databases = [view.scope.target.schema]
    if not databases[0]:
        with translated_errors():
            databases = [name for name in view.client.list_database_names() if view.scope.match_database(name)]
    return read_collections(view.client, databases=databases, wanted=view.scope.match)


def _check_collections(view: _View) -> Iterator[Finding]:
    include = ", ".join(view.source.tables.include)
    plain = [collection for collection in view.collections if collection.kind == "collection"]
    if plain:
        yield from check_globs("collections", view.source, [collection.name for collection in plain])
    else:
        fix = "correct `tables` (globs over database.collection), unless they are yet to be made"
        yield Finding("warning", "collections", f"none matches {include}", fix)
    for collection in view.collections:
        if collection.kind == "collection":
            continue
        named = str(collection.name) in view.source.tables.include
        yield Finding(
            "error" if named else "warning",
            str(collection.name),
            f"a {collection.kind}: it has no change stream, and is not mirrored",
            "remove it from tables.include" if named else "exclude it, to show that this is known",
        )


def _check_stream(view: _View) -> Iterator[Finding]:
    """By opening it: that shows versions and privileges alike."""
    target = view.scope.target
    options = stream_options(view.source, view.deployment)
    if not target.schema:
        options["allChangesForCluster"] = True
    pipeline = [{"$changeStream": options}, *stream_pipeline(view.source, view.scope, view.deployment)]
    database = view.client[target.schema or "admin"]
    with translated_errors(streaming=True):
        reply = database.command("aggregate", target.name or 1, pipeline=pipeline, cursor={}, codec_options=RAW)
        cursor = reply["cursor"]
        name = str(cursor["ns"]).partition(".")[2]
        database.command("killCursors", name, cursors=[Int64(cursor["id"])])
    what = f"{target.schema}.{target.name}".rstrip(".") if target.schema else "the whole deployment"
    yield Finding("ok", "change stream", f"can be opened on {what}")


def _check_reading(view: _View) -> Iterator[Finding]:
    """The copy reads what the stream does not bring."""
    seen: set[str] = set()
    for collection in view.collections:
        name = collection.name
        if collection.kind != "collection" or name.schema in seen:
            continue
        seen.add(name.schema)
        with translated_errors():
            view.client[name.schema].get_collection(name.name, codec_options=RAW).find_one({}, {"_id": 1})
    if seen:
        yield Finding("ok", "reading", f"allowed, with majority read concern, in {', '.join(sorted(seen)[:_SHOWN])}")


def _check_majority(view: _View) -> Iterator[Finding]:
    delay = majority_delay(view.hello)
    if delay > STALLED_SECONDS:
        message = f"the newest write has waited for {delay:.0f} s: no change is given out before a majority has it"
        yield Finding("warning", "majority", message, "rs.status(): most voting members must be up and keep pace")


def _check_oplog(view: _View) -> Iterator[Finding]:
    if view.deployment.sharded:
        return
    try:
        window = _oplog_seconds(view.client)
        full = _oplog_is_full(view.client)
    except OperationFailure:
        yield Finding(
            "warning",
            "oplog",
            "how far it reaches back cannot be read, so the status cannot warn before history is lost",
            'db.grantRolesToUser(USER, [{role: "read", db: "local"}])',
        )
        return
    message = f"reaches back {window / 3600:.1f} hours: no stop may be longer"
    if not full:
        yield Finding("ok", "oplog", f"reaches back {window / 3600:.1f} hours, and has room for more")
    elif window < SHORT_OPLOG_SECONDS:
        fix = "db.adminCommand({replSetResizeOplog: 1, minRetentionHours: 48}), or a larger size"
        yield Finding("warning", "oplog", message, fix)
    else:
        yield Finding("ok", "oplog", message)


def _oplog_seconds(client: Client) -> float:
    oplog = client.local.get_collection("oplog.rs", codec_options=RAW)
    entries = [oplog.find_one({}, {"ts": 1}, sort=[("$natural", direction)]) for direction in (1, -1)]
    times = [entry["ts"].time for entry in entries if entry is not None]
    if len(times) < 2:
        raise TransientError("the oplog is empty", hint="is the replica set being initiated?")
    return float(times[1] - times[0])


def _oplog_is_full(client: Client) -> bool:
    return is_full(bson.decode(client.local.command("collStats", "oplog.rs", codec_options=RAW).raw))


def _check_images(view: _View) -> Iterator[Finding]:
    wanted = {view.source.full_document, view.source.full_document_before_change} & {"whenAvailable", "required"}
    if not wanted:
        return
    level: Any = "error" if "required" in wanted else "warning"
    for collection in view.collections:
        images = bson.decode(collection.options).get("changeStreamPreAndPostImages", {})
        if collection.kind == "collection" and not images.get("enabled"):
            name = collection.name
            yield Finding(
                level,
                str(name),
                f"records no images, and the configuration says {', '.join(sorted(wanted))!r}",
                f"db.getSiblingDB({name.schema!r}).runCommand({{collMod: {name.name!r}, "
                "changeStreamPreAndPostImages: {enabled: true}})",
            )


_CHECKS: Final[Mapping[str, Callable[[_View], Iterator[Finding]]]] = {
    "collections": _check_collections,
    "change stream": _check_stream,
    "reading": _check_reading,
    "majority": _check_majority,
    "oplog": _check_oplog,
    "images": _check_images,
}
