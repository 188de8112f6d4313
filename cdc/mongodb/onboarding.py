"""For `cdc init`: what a deployment has, and the statements for mongosh of a user with just the roles that it needs."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from typing import Final

from cdc.config import Config, SinkConfig, SourceConfig
from cdc.first_config import Script
from cdc.mongodb.client import connect, translated_errors
from cdc.mongodb.collections import read_collections
from cdc.mongodb.preflight import ask
from cdc.mongodb.scope import SYSTEM_DATABASES, scope_of
from cdc.mongodb.target import DEFAULT_DATABASE
from cdc.mongodb.url import database_name
from cdc.secret import Secret

_OPLOG: Final = {"role": "read", "db": "local"}
"""How far the oplog reaches back: so that the status warns before history is lost."""


def contents(url: str) -> dict[str, int]:
    """Databases, and how many collections of each can be captured. Raises `CdcError` where it cannot be asked."""
    with closing(connect(url, application_name="cdc init", serverSelectionTimeoutMS=5000)) as client:
        ask(client)
        with translated_errors():
            names = [name for name in client.list_database_names() if name not in SYSTEM_DATABASES]
        found = read_collections(client, databases=names, wanted=lambda _name: True)
    return dict(sorted(Counter(each.name.schema for each in found if each.kind == "collection").items()))


def source_role(config: Config, source: SourceConfig, role: str) -> Script:
    """What to run at the source, as a user who may create users: reading what is captured, and the oplog's ends."""
    assert source.url is not None
    database = scope_of(config, source).target.schema
    reading = {"role": "read", "db": database} if database else {"role": "readAnyDatabase", "db": "admin"}
    return _script(source.url, role, [reading, _OPLOG])


def mirror_role(sink: SinkConfig, role: str) -> Script:
    """What to run at the mirror: writing the databases that it is named after, and the one of its position."""
    assert sink.url is not None
    databases = sorted({name.partition(".")[0] for name in sink.rename.values()} | {_own(sink)})
    return _script(
        sink.url, role, [{"role": each, "db": name} for name in databases for each in ("readWrite", "dbAdmin")]
    )


def _own(sink: SinkConfig) -> str:
    assert sink.url is not None
    return database_name(sink.url.reveal()) or DEFAULT_DATABASE


def _script(url: Secret, role: str, roles: list[dict[str, str]]) -> Script:
    """Also for a user who is there already."""
    user, granted = json.dumps(role), json.dumps(roles)
    text = (
        'const admin = db.getSiblingDB("admin");\n'
        f"if (admin.getUser({user})) admin.grantRolesToUser({user}, {granted});\n"
        f"else admin.createUser({{user: {user}, pwd: passwordPrompt(), roles: {granted}}});\n"
    )
    return Script(url.reveal(), text)
