"""The archive's table of contents: parsing, selecting, cutting; all without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc.change import TableName
from cdc.errors import FatalError
from cdc.postgres.dump import (
    SchemaDump,
    SchemaEntry,
    _without_psql_commands,
    _without_secrets,
    pg_dump_version,
)
from cdc.postgres.schema import SchemaTable, type_holds
from cdc.postgres.toc import TocEntry, parse_toc, select_entries, split_script

LISTING = """;
; Archive created at 2026-01-01 00:00:00 UTC
;     dbname: shop
;
; Selected TOC Entries:
;
2717; 1262 16384 DATABASE - shop postgres
226; 1259 16433 TABLE public skip postgres
2718; 0 0 COMMENT public TABLE skip postgres
;\tdepends on: 226
222; 1259 16401 TABLE public a new name postgres
230; 1259 16461 VIEW public over_skip postgres
;\tdepends on: 226 222
231; 1259 16462 VIEW public over_view postgres
;\tdepends on: 230
2511; 3466 16528 EVENT TRIGGER - watch postgres
;\tdepends on: 245
"""


def test_parse_toc_keeps_ids_labels_and_dependencies() -> None:
    entries = parse_toc(LISTING)
    assert [entry.dump_id for entry in entries] == [2717, 226, 2718, 222, 230, 231, 2511]
    assert entries[4] == TocEntry(230, 1259, 16461, "VIEW public over_skip postgres", (226, 222))
    assert entries[3].depends_on == ()


def test_what_depends_on_an_unwanted_entry_leaves_with_it() -> None:
    selected = select_entries(parse_toc(LISTING), {(1259, 16433)})
    assert [entry.dump_id for entry in selected] == [222]


def test_databases_and_event_triggers_never_travel() -> None:
    selected = select_entries(parse_toc(LISTING), ())
    assert [entry.dump_id for entry in selected] == [226, 2718, 222, 230, 231]


def test_an_oid_counts_only_within_its_catalog() -> None:
    assert len(select_entries(parse_toc(LISTING), {(2606, 16433)})) == 5


def test_dependencies_in_a_circle_end() -> None:
    toc = [TocEntry(1, 1259, 1, "a", (2,)), TocEntry(2, 1259, 2, "b", (1,)), TocEntry(3, 1259, 3, "c", ())]
    assert [entry.dump_id for entry in select_entries(toc, {(1259, 2)})] == [3]


def entry(number: int, kind: str, table: str | None, *depends_on: int) -> SchemaEntry:
    return SchemaEntry(number, kind, "", None if table is None else TableName("public", table), (), depends_on, "")


def test_f15_what_a_new_table_takes_on_a_mirror_that_has_the_others() -> None:
    """A view over both and the foreign key to the new one come; types and keys of the old one are not asked for."""
    dump = SchemaDump(
        origin=("", ""),
        tables=(table("old"), table("new")),
        sequences=(),
        database="",
        pre_data=(
            entry(1, "TYPE", None),
            entry(2, "TYPE", None),
            entry(3, "TABLE", "old", 1),
            entry(4, "TABLE", "new", 2),
            entry(5, "VIEW", None, 3, 4),
            entry(6, "VIEW", None, 3),
            entry(7, "TABLE", "part_of_new", 4),
        ),
        post_data=(
            entry(8, "PRIMARY KEY", "old", 3),
            entry(9, "PRIMARY KEY", "new", 4),
            entry(10, "FK CONSTRAINT", "old", 3, 9),
            entry(11, "FK CONSTRAINT", "new", 4, 8),
            entry(12, "INDEX", "old", 3),
        ),
    )
    selection = dump.select([TableName("public", "new")])
    assert sorted(selection.about) == [4, 5, 7, 9, 10, 11]
    assert sorted(selection.needed) == [2, 4, 5, 7, 8, 9, 10, 11]
    everything = dump.select([TableName("public", "old"), TableName("public", "new")])
    assert sorted(everything.needed) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert dump.select([]) == (set(), set())


def table(name: str) -> SchemaTable:
    return SchemaTable(1, TableName("public", name), False, (), (), False, "d", (), False)


def test_split_script_is_not_fooled_by_text_that_looks_like_another_heading() -> None:
    first = "--\n-- TOC entry 1 (class 1259 OID 5)\n-- Name: a\n--\nSELECT '\n--\n-- TOC entry 9 (class 1 OID 1)\n';"
    second = "--\n-- TOC entry 2 (class 0 OID 0)\n-- Name: b\n--\nSELECT 2;"
    entries = [TocEntry(1, 1259, 5, "", ()), TocEntry(2, 0, 0, "", ())]
    parts = list(split_script(f"SET transaction_timeout = 0;\n{first}\n\n{second}\n", entries))
    assert parts == [(entries[0], first), (entries[1], second)]


def test_split_script_leaves_out_entries_without_sql() -> None:
    text = "--\n-- TOC entry 2 (class 0 OID 0)\n-- Name: b\n--\nSELECT 2;"
    entries = [TocEntry(number, 0, 0, "", ()) for number in (1, 2, 3)]
    assert list(split_script(f"SET x = 0;\n{text}\n", entries)) == [(entries[1], text)]
    assert list(split_script("SET x = 0;\n", entries)) == []


def test_only_the_archives_own_psql_commands_go() -> None:
    script = "\\restrict TOKEN\nSELECT '\n\\restrict other\n';\n\\unrestrict TOKEN\n"
    assert _without_psql_commands(script) == "SELECT '\n\\restrict other\n';\n"
    assert _without_psql_commands("SELECT 1;\n") == "SELECT 1;\n"


def test_f113_the_password_is_no_argument() -> None:
    visible, environment = _without_secrets("postgresql://me:geh%20heim@127.0.0.1:5/shop?application_name=x")
    assert "geh" not in visible
    assert "host=127.0.0.1" in visible
    assert environment == {"PGPASSWORD": "geh heim"}


def test_f113_a_secret_that_has_no_variable_is_refused() -> None:
    with pytest.raises(FatalError, match="sslpassword") as caught:
        _without_secrets("host=127.0.0.1 sslpassword=geheim")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("pg_dump (PostgreSQL) 18.6", (18, 6)),
        ("pg_dump (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)", (15, 14)),
        ("pg_dump (PostgreSQL) 19beta1", (19, 0)),
    ],
)
def test_pg_dump_version(tmp_path: Path, says: str, version: tuple[int, int]) -> None:
    assert pg_dump_version(_program(tmp_path, f"echo '{says}'")) == version


def test_pg_dump_that_is_missing_fails_or_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="No such file"):
        pg_dump_version(tmp_path / "absent")
    with pytest.raises(FatalError, match="is no pg_dump"):
        pg_dump_version(_program(tmp_path, "echo hello"))
    with pytest.raises(FatalError, match="library lost"):
        pg_dump_version(_program(tmp_path, "echo library lost >&2; exit 1"))


@pytest.mark.parametrize(
    ("source", "target", "holds"),
    [
        ("integer", "integer", True),
        ("integer", "bigint", True),
        ("bigint", "integer", False),
        ("integer", "text", False),
        ("character varying(10)", "character varying(20)", True),
        ("character varying(20)", "character varying(10)", False),
        ("character varying", "character varying(10)", False),
        ("character varying(10)", "text", True),
        ("text", "character varying", False),
        ("character(5)", "text", False),
        ("numeric(10,2)", "numeric", True),
        ("numeric", "numeric(10,2)", False),
        ("timestamp with time zone", "timestamp without time zone", False),
    ],
)
def test_f102_which_types_hold_which(source: str, target: str, holds: bool) -> None:
    assert type_holds(source, target) is holds


def _program(folder: Path, script: str) -> Path:
    path = folder / "pg_dump"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path
