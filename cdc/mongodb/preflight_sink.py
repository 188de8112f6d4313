"""Whether a MongoDB deployment is ready to be mirrored into. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Final

import bson

from cdc.change import TableName
from cdc.config import Config, SinkConfig
from cdc.mongodb.client import RAW, Client, connect, translated_errors
from cdc.mongodb.collections import deployment_id, mirrored, read_collections
from cdc.mongodb.error_codes import REPLICA_SET_HINT
from cdc.mongodb.scope import Scope, scope_of
from cdc.preflight import Finding, guard
from cdc.urls import hosts_of

_SERVER_SELECTION: Final = {"serverSelectionTimeoutMS": 5000}
_SHOWN: Final = 5

_ACTIONS: Final = (
    "find", "insert", "update", "remove", "createCollection", "createIndex", "dropCollection", "dropIndex",
    "collMod", "listCollections", "listIndexes",
)  # fmt: skip
"""What a mirror does; the role `readWrite` holds all but collMod, `dbAdmin` that one."""


def check_sink(config: Config, sink: SinkConfig) -> Iterator[Finding]:
    """Yield what is in order and what is not. Raises `CdcError` where one of the servers cannot be asked at all."""
    source = config.sources[sink.source]
    assert source.url is not None
    assert sink.url is not None
    options: dict[str, Any] = dict(_SERVER_SELECTION)
    with (
        closing(connect(source.url.reveal(), application_name="cdc check", **options)) as origin,
        closing(connect(sink.url.reveal(), application_name="cdc check", **options)) as target,
    ):
        yield from _check_server(target)
        tables = _captured(config, sink, origin)
        yield from guard("target", _check_not_the_source(config, sink, tables, origin, target))
        yield from guard("privileges", _check_privileges(sink, tables, target))
        yield from guard("target", _check_other_sinks(config, sink, tables))


def _captured(config: Config, sink: SinkConfig, origin: Client) -> list[TableName]:
    scope = scope_of(config, config.sources[sink.source])
    databases = [scope.target.schema]
    if not databases[0]:
        with translated_errors():
            databases = [name for name in origin.list_database_names() if scope.match_database(name)]
    return [each.name for each in mirrored(read_collections(origin, databases=databases, wanted=scope.match))]


def _check_server(target: Client) -> Iterator[Finding]:
    with translated_errors():
        hello = bson.decode(target.admin.command("hello", codec_options=RAW).raw)
        version = target.admin.command("buildInfo", codec_options=RAW)["version"]
    if hello.get("setName") is None and hello.get("msg") != "isdbgrid":
        message = f"MongoDB {version} is a standalone: deltas and the position must be written in one transaction"
        yield Finding("error", "server", message, REPLICA_SET_HINT)
    elif not hello.get("isWritablePrimary"):
        yield Finding("error", "server", "it is no primary: nothing can be written", "add ?replicaSet=NAME to the url")
    else:
        yield Finding("ok", "server", f"MongoDB {version}, writable")


def _check_not_the_source(
    config: Config, sink: SinkConfig, tables: Sequence[TableName], origin: Client, target: Client
) -> Iterator[Finding]:
    """A collection that is its own mirror would be emptied by the copy, and then changed for ever."""
    if deployment_id(origin) != deployment_id(target):
        return
    same = [table for table in tables if sink.target_name(table) == table]
    if same:
        yield Finding(
            "error",
            "target",
            f"the same collections as the source: {_listed(same)}",
            f"name another database in the url of sink {sink.name}, or rename = {{{same[0].schema} = ...}}",
        )
    scope = scope_of(config, config.sources[sink.source])
    crossed = [table for table in tables if _is_wanted(scope, sink.target_name(table)) and table not in same]
    if crossed:
        fix = "correct `rename`, exclude it at the source, or write the servers in both urls alike"
        yield Finding("error", "target", f"mirrored into what the source captures itself: {_listed(crossed)}", fix)


def _is_wanted(scope: Scope, target: TableName) -> bool:
    """Whether the source captures it; or should, but does not, as a sink writes to it."""
    return scope.match(target) or str(target) in scope.globs.include


def _check_privileges(sink: SinkConfig, tables: Sequence[TableName], target: Client) -> Iterator[Finding]:
    """By what the server says of the user: trying would change something."""
    with translated_errors():
        status = bson.decode(target.admin.command("connectionStatus", 1, showPrivileges=True, codec_options=RAW).raw)[
            "authInfo"
        ]
    if not status.get("authenticatedUsers"):
        yield Finding("ok", "privileges", "nobody is logged in: the server asks for no login")
        return
    privileges = status.get("authenticatedUserPrivileges", ())
    databases = sorted({sink.target_name(table).schema for table in tables})
    for database in databases:
        missing = [action for action in _ACTIONS if not _allows(privileges, database, action)]
        if missing:
            fix = f'db.grantRolesToUser(USER, [{{role: "readWrite", db: "{database}"}}, ' + (
                f'{{role: "dbAdmin", db: "{database}"}}])'
            )
            yield Finding("error", "privileges", f"on {database} not allowed: {', '.join(missing)}", fix)
            return
    yield Finding("ok", "privileges", f"sufficient on {', '.join(databases[:_SHOWN]) or 'the target'}")


def _allows(privileges: Collection[Mapping[str, Any]], database: str, action: str) -> bool:
    """Whether an action is allowed on every collection of a database."""
    for privilege in privileges:
        resource = privilege.get("resource", {})
        everywhere = resource.get("anyResource") or (
            resource.get("db") in {"", database} and resource.get("collection") == ""
        )
        actions = privilege.get("actions", ())
        if everywhere and (action in actions or "anyAction" in actions):
            return True
    return False


def _check_other_sinks(config: Config, sink: SinkConfig, tables: Sequence[TableName]) -> Iterator[Finding]:
    """Two sinks that write the same collections undo each other's work."""
    assert sink.url is not None
    hosts = hosts_of(sink.url.reveal())
    ours = {sink.target_name(table) for table in tables}
    for other in config.sinks.values():
        if other.name == sink.name or other.kind != sink.kind or other.url is None:
            continue
        if not hosts & hosts_of(other.url.reveal()):
            continue
        if other.source == sink.source:
            shared = sorted(map(str, ours & {other.target_name(table) for table in tables}))
        else:
            shared = sorted(
                {table.schema for table in ours} & {name.partition(".")[0] for name in other.rename.values()}
            )
        if shared:
            message = f"sink {other.name} writes to the same: {', '.join(shared[:_SHOWN])}"
            yield Finding("error", "target", message, "give one of them another database")


def _listed(tables: Sequence[TableName]) -> str:
    more = f" and {len(tables) - _SHOWN} more" if len(tables) > _SHOWN else ""
    return ", ".join(map(str, tables[:_SHOWN])) + more
