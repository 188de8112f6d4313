"""The source's schema as SQL, taken with `pg_dump`: what a mirror needs before the copy, and what comes after it.

Entries are selected by OID and dependency, never by patterns over names: a table that is not captured leaves, and with
it all that depends on it (views, foreign keys, indexes, its row type).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog
from psycopg import pq
from psycopg.conninfo import make_conninfo

from cdc.change import TableName
from cdc.errors import FatalError, TransientError
from cdc.postgres.connection import Connection, connect, translated_errors
from cdc.postgres.schema import SchemaTable, database_identity, read_tables
from cdc.postgres.sequences import read_sequences
from cdc.postgres.shape import TableShape, read_shapes
from cdc.postgres.toc import TocEntry, parse_toc, reach, reverse, select_entries, split_script
from cdc.postgres.unreadable import Unreadable, read_unreadable

log = structlog.get_logger()

TABLE: Final = "TABLE"
PRIMARY_KEY: Final = "PRIMARY KEY"
REPLICA_IDENTITY: Final = "REPLICA IDENTITY"
KEY_KINDS: Final = (PRIMARY_KEY, REPLICA_IDENTITY)
"""Kinds of post-data that the stream needs: it finds rows by them."""

_DUMP_OPTIONS: Final = (
    "--format=custom",
    "--schema-only",
    "--no-owner",
    "--no-privileges",
    "--no-publications",
    "--no-subscriptions",
    "--no-tablespaces",
    "--no-security-labels",
    "--encoding=UTF8",
    "--lock-wait-timeout=60s",
    "--no-password",
)

_RESTORE_OPTIONS: Final = ("--no-owner", "--no-privileges", "--no-tablespaces", "--no-security-labels", "--verbose")

_ENGLISH: Final = {"LC_ALL": "C"}

_WAITING_HELPS: Final = re.compile(r"connection to server|lock timeout|too many clients|terminating connection")

_PG_CLASS: Final = 1259
_PG_NAMESPACE: Final = 2615


class SchemaEntry(msgspec.Struct, frozen=True):
    """A piece of the schema. Its SQL has the source's names.

    number, depends_on: entries depend on each other by number.
    kind: one of `KEY_KINDS` where the stream needs it, else pg_dump's word (`TABLE`, `INDEX`, `FK CONSTRAINT`...).
    table: the table (or partition) it belongs to, by its name at the source.
    relations: all tables and partitions that it is about, or that what it depends on is about.
    object_id: catalog and OID at the source, which stay while names change; zeros where it stands for no object.
    """

    number: int
    kind: str
    name: str
    table: TableName | None
    relations: tuple[TableName, ...]
    depends_on: tuple[int, ...]
    sql: str
    object_id: tuple[int, int] = (0, 0)


class Selection(NamedTuple):
    """Entries, by number.

    about: what makes some tables, and all that depends on them. needed: that, and what it depends on itself.
    """

    about: Collection[int]
    needed: Collection[int]


class SchemaDump(msgspec.Struct, frozen=True):
    """The captured tables, and the SQL that makes them somewhere else.

    origin: the `database_identity` of the source.
    shapes: what they are, as far as a mirror follows that. sequences: those that no column owns.
    database: the options of a CREATE DATABASE with the same encoding and collation.
    pre_data, post_data: what comes before and after the copy, in an order in which each finds what it depends on;
    assumes `search_path = ''`, UTF8 and `check_function_bodies = off`.
    """

    origin: tuple[str, str]
    tables: tuple[SchemaTable, ...]
    sequences: tuple[TableName, ...]
    database: str
    pre_data: tuple[SchemaEntry, ...]
    post_data: tuple[SchemaEntry, ...]
    shapes: tuple[TableShape, ...] = ()

    def select(self, tables: Collection[TableName]) -> Selection:
        """What some of the captured tables take, on a mirror that has the others."""
        others = {table.name for table in self.tables if table.name not in tables}
        edges = {
            entry.number: entry.depends_on
            for entry in (*self.pre_data, *self.post_data)
            if not (entry.kind == TABLE and entry.table in others)
        }
        made = (entry.number for entry in self.pre_data if entry.kind == TABLE and entry.table in tables)
        about = reach(made, reverse(edges))
        return Selection(about & edges.keys(), reach(about, edges) & edges.keys())


class Belonging(NamedTuple):
    """What the catalog knows of an entry: its table, and which key it is, if any."""

    table: TableName
    key_kind: str | None


def dump_schema(url: str, tables: Collection[TableName], *, pg_dump: str) -> SchemaDump:
    """Describe `tables` and all that they need. Raises `FatalError` where pg_dump is missing, too old or refused."""
    with connect(url, application_name="cdc-schema") as connection:
        program = _find_pg_dump(pg_dump, connection.info.server_version // 10000)
        shapes = _shapes(connection, tables)
        with tempfile.TemporaryDirectory(prefix="cdc-") as folder:
            archive = Archive(program.with_name("pg_restore"), Path(folder))
            unreadable = read_unreadable(connection, tables)
            _run_pg_dump(program, url, archive.path, *unreadable.pg_dump_options)
            schema = _read_archive(connection, archive, tables, unreadable)
        if _shapes(connection, tables) != shapes:
            raise TransientError("tables were altered while their schema was read: it is read again")
        return msgspec.structs.replace(schema, shapes=shapes)


def pg_dump_version(path: str | Path) -> tuple[int, int]:
    """Major and minor version of a pg_dump. Raises `FatalError` if it is missing or does not say."""
    try:
        output = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    except OSError as exc:
        raise FatalError(
            f"{path}: {exc.strerror}", hint="install the PostgreSQL client programs, or set pg_dump"
        ) from exc
    except subprocess.CalledProcessError as exc:
        raise FatalError(
            f"{path} --version failed: {_complaint(exc.stderr)}", hint="set pg_dump to another one"
        ) from exc
    found = re.search(r"\) (\d+)(?:\.(\d+))?", output)
    if found is None:
        raise FatalError(f"{path} is no pg_dump: it says {output.strip()[:80]!r}", hint="set pg_dump for the source")
    return int(found[1]), int(found[2] or 0)


class Archive:
    """A dump in pg_dump's custom format."""

    def __init__(self, pg_restore: Path, folder: Path) -> None:
        self.path = folder / "schema.dump"
        self._list_path = folder / "entries"
        self._pg_restore = pg_restore

    def contents(self) -> list[TocEntry]:
        """All entries, in the order of restoring."""
        return parse_toc(self._run("--list", "--verbose"))

    def post_data(self) -> frozenset[int]:
        """Dump ids of what is built after the data."""
        return frozenset(entry.dump_id for entry in parse_toc(self._run("--list", "--section=post-data")))

    def script(self, entries: Iterable[TocEntry], *options: str) -> str:
        """The SQL of some entries, without the commands that only psql knows."""
        self._list_path.write_text("".join(f"{entry.dump_id};\n" for entry in entries))
        output = self._run(*_RESTORE_OPTIONS, *options, f"--use-list={self._list_path}", "--file=-")
        return _without_psql_commands(output)

    def _run(self, *arguments: str) -> str:
        command = [str(self._pg_restore), *arguments, str(self.path)]
        try:
            return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout  # noqa: S603
        except FileNotFoundError as exc:
            raise FatalError(
                f"{self._pg_restore} is missing", hint="it belongs to the same package as pg_dump"
            ) from exc
        except subprocess.CalledProcessError as exc:
            raise FatalError(f"pg_restore failed: {_complaint(exc.stderr)}") from exc


def _find_pg_dump(configured: str, server_major: int) -> Path:
    wanted = f'install postgresql-client-{server_major}, or set pg_dump = "/path/to/pg_dump" for the source'
    found = shutil.which(configured)
    if found is None:
        raise FatalError(f"{configured} not found, and the server is PostgreSQL {server_major}", hint=wanted)
    major, minor = pg_dump_version(found)
    if major < server_major:
        raise FatalError(f"{found} is version {major}.{minor}, the server is PostgreSQL {server_major}", hint=wanted)
    return Path(found)


def _run_pg_dump(program: Path, url: str, output: Path, *options: str) -> None:
    conninfo, environment = _without_secrets(url)
    command = [str(program), *_DUMP_OPTIONS, *options, f"--file={output}", f"--dbname={conninfo}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment | _ENGLISH)  # noqa: S603
    if done.returncode == 0:
        return
    message = f"pg_dump failed: {_complaint(done.stderr)}"
    if _WAITING_HELPS.search(done.stderr):
        raise TransientError(message)
    raise FatalError(message, hint="it needs SELECT on the captured tables: `cdc check` says what is missing")


def _without_secrets(url: str) -> tuple[str, dict[str, str]]:
    """Split into what everybody may see in the process list, and environment variables for the rest."""
    visible, environment = {}, {}
    for option in pq.Conninfo.parse(make_conninfo(url).encode()):
        keyword, value = option.keyword.decode(), option.val.decode() if option.val else None
        if value is None:
            continue
        if option.dispchar != b"*":
            visible[keyword] = value
        elif option.envvar:
            environment[option.envvar.decode()] = value
        else:
            raise FatalError(
                f"pg_dump cannot be given {keyword} without showing it in the process list",
                hint=f"name a service in the url, and write {keyword} into pg_service.conf",
            )
    return make_conninfo(**visible), environment


def _read_archive(
    connection: Connection, archive: Archive, names: Collection[TableName], unreadable: Unreadable
) -> SchemaDump:
    captured = {name: table for name, table in read_tables(connection).items() if name in names}
    if missing := set(names) - set(captured):
        raise FatalError(f"no such table at the source: {', '.join(map(str, sorted(missing)))}")
    oids = [table.oid for table in captured.values()]
    toc = archive.contents()
    selected = select_entries(toc, _unwanted(connection, oids) | set(unreadable.dependent))
    _check_complete(captured.values(), toc, selected)
    entries = list(_entries(archive.script(selected), selected, _belongings(connection, oids)))
    post_data = archive.post_data()
    return SchemaDump(
        origin=database_identity(connection),
        tables=tuple(captured.values()),
        sequences=tuple(value.name for value in read_sequences(connection, names) if value.owner is None),
        database=_database_options(archive.script((e for e in toc if e.catalog == 1262), "--create")),
        pre_data=tuple(entry for entry in entries if entry.number not in post_data),
        post_data=tuple(entry for entry in entries if entry.number in post_data),
    )


def _shapes(connection: Connection, tables: Collection[TableName]) -> tuple[TableShape, ...]:
    return tuple(shape for shape in read_shapes(connection) if shape.qualified in tables)


def _unwanted(connection: Connection, oids: list[int]) -> set[tuple[int, int]]:
    with translated_errors():
        return {(catalog, oid) for catalog, oid in connection.execute(_UNWANTED, {"tables": oids}).fetchall()}


def _belongings(connection: Connection, oids: list[int]) -> dict[tuple[int, int], Belonging]:
    with translated_errors():
        return {
            (catalog, oid): Belonging(TableName(schema, name), key_kind)
            for catalog, oid, schema, name, key_kind in connection.execute(_BELONGINGS, {"tables": oids}).fetchall()
        }


def _check_complete(tables: Iterable[SchemaTable], toc: Sequence[TocEntry], selected: Sequence[TocEntry]) -> None:
    """A captured table must not fall with one that is not captured (an inheritance parent, a row type)."""
    kept = {entry.dump_id for entry in selected}
    entries = {entry.dump_id: entry for entry in toc}
    by_oid = {entry.oid: entry for entry in toc if entry.catalog == _PG_CLASS}
    for table in tables:
        entry = by_oid[table.oid]
        if entry.dump_id not in kept:
            reasons = [entries[i].label for i in entry.depends_on if i in entries and i not in kept]
            raise FatalError(
                f"{table.name} cannot be mirrored without what it depends on: {', '.join(reasons)}",
                hint="capture that table too, or exclude this one",
            )
    left_out = [entry.label for entry in toc if entry.dump_id not in kept and entry.oid]
    log.debug("schema entries left out", entries=left_out)


def _entries(
    script: str, selected: Sequence[TocEntry], belongings: Mapping[tuple[int, int], Belonging]
) -> Iterator[SchemaEntry]:
    known = {e.dump_id: belongings[e.catalog, e.oid] for e in selected if (e.catalog, e.oid) in belongings}
    edges = {entry.dump_id: entry.depends_on for entry in selected}
    for entry, text in split_script(script, selected):
        candidates = (known.get(dump_id) for dump_id in (entry.dump_id, *entry.depends_on))
        belonging = next(filter(None, candidates), None)  # an attached index is no object: it is what it attaches
        kind, name = _title(text)
        yield SchemaEntry(
            number=entry.dump_id,
            kind=belonging.key_kind if belonging is not None and belonging.key_kind is not None else kind,
            name=name,
            table=belonging.table if belonging is not None else None,
            relations=tuple(sorted({known[n].table for n in reach([entry.dump_id], edges) if n in known})),
            depends_on=entry.depends_on,
            sql=text,
            object_id=(entry.catalog, entry.oid),
        )


def _title(text: str) -> tuple[str, str]:
    """Type and name from an entry's heading; newlines in names are blanks there."""
    found = re.search(r"^-- Name: (.*); Type: ([A-Z ]+); Schema: .*; Owner: ", text, re.MULTILINE)
    assert found is not None, text[:200]
    return found[2], found[1]


def _database_options(script: str) -> str:
    found = re.search(r"^CREATE DATABASE .* WITH (TEMPLATE = template0 .*);$", script, re.MULTILINE)
    assert found is not None, script[:200]
    return found[1]


def _without_psql_commands(script: str) -> str:
    r"""Drop `\restrict` and `\unrestrict`, which minor releases since August 2025 write for psql alone."""
    found = re.search(r"^\\restrict (\w+)$", script, re.MULTILINE)
    return script if found is None else re.sub(rf"^\\(?:un)?restrict {found[1]}\n", "", script, flags=re.MULTILINE)


def _complaint(stderr: str) -> str:
    """What a program complained about first, without details and advice."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error:" in line), lines[-1])


_TREES: Final = """
WITH kept AS (
    SELECT c.oid, n.nspname, c.relname
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.oid = ANY (%(tables)s::oid[])
        OR c.oid IN (SELECT relid FROM unnest(%(tables)s::oid[]) AS t, pg_partition_tree(t))
)
"""

_UNWANTED: Final = f"""{_TREES}
SELECT {_PG_CLASS}, oid::bigint FROM pg_class WHERE relkind IN ('r', 'p', 'f') AND oid NOT IN (SELECT oid FROM kept)
UNION ALL
SELECT {_PG_NAMESPACE}, oid::bigint FROM pg_namespace WHERE nspname = 'cdc'
"""  # noqa: S608 - a constant

_BELONGINGS: Final = f"""{_TREES}, key AS (
    SELECT indexrelid, indrelid, CASE WHEN indisprimary THEN '{PRIMARY_KEY}'
                                      WHEN indisreplident THEN '{REPLICA_IDENTITY}' END AS kind FROM pg_index
), part (catalog, oid, relation, kind) AS (
    SELECT 'pg_class'::regclass, oid, oid, NULL FROM kept
    UNION ALL SELECT 'pg_class'::regclass, indexrelid, indrelid, kind FROM key
    UNION ALL SELECT 'pg_constraint'::regclass, o.oid, o.conrelid, key.kind
                FROM pg_constraint o LEFT JOIN key ON key.indexrelid = o.conindid AND o.contype IN ('p', 'u')
    UNION ALL SELECT 'pg_trigger'::regclass, oid, tgrelid, NULL FROM pg_trigger
    UNION ALL SELECT 'pg_rewrite'::regclass, oid, ev_class, NULL FROM pg_rewrite
    UNION ALL SELECT 'pg_policy'::regclass, oid, polrelid, NULL FROM pg_policy
    UNION ALL SELECT 'pg_statistic_ext'::regclass, oid, stxrelid, NULL FROM pg_statistic_ext
)
SELECT part.catalog::oid::bigint, part.oid::bigint, kept.nspname, kept.relname, part.kind
  FROM part JOIN kept ON kept.oid = part.relation
"""  # noqa: S608 - a constant
