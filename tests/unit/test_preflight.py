"""What is found out is shown, counted and raised; the checks of the daemon's own folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cdc.config import Config
from cdc.config_file import parse
from cdc.errors import FatalError, TransientError
from cdc.postgres.connection import sorted_error
from cdc.preflight import Finding, Section, as_json, check_data_dir, collect, failed, guard, render, require

OK = Finding("ok", "server", "PostgreSQL 18")
WARNING = Finding("warning", "fsync", "is off", "set fsync = on")
ERROR = Finding("error", "public.t", "has no [key]", 'ALTER TABLE "public"."t" REPLICA IDENTITY FULL')


def breaking_off() -> Iterator[Finding]:
    yield OK
    raise TransientError("connection lost", hint="is it running?")


def text_of(*sections: Section) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(sections))
    return capture.get()


def test_error_that_ends_a_check_becomes_its_last_finding() -> None:
    broken_off = Finding("error", "check", "connection lost", "is it running?")
    assert collect("source shop", breaking_off()) == Section("source shop", (OK, broken_off))
    assert [finding.subject for finding in guard("slot", breaking_off())] == ["server", "slot"]


def test_only_errors_fail() -> None:
    assert not failed([Section("a", (OK, WARNING))])
    assert failed([Section("a", (OK, WARNING)), Section("b", (ERROR,))])


def test_require_raises_the_first_error_and_counts_the_others() -> None:
    require([OK, WARNING])
    with pytest.raises(FatalError, match=r"^public\.t: has no \[key\]$") as raised:
        require([OK, WARNING, ERROR])
    assert raised.value.hint == ERROR.fix
    with pytest.raises(FatalError, match=r"and 2 more: `cdc check`"):
        require([ERROR, WARNING, ERROR, ERROR])


def test_rendered_with_the_fix_below_and_nothing_taken_for_markup() -> None:
    lines = [line.rstrip() for line in text_of(Section("source shop", (OK, ERROR))).splitlines()]
    assert lines == [
        "source shop",
        "  ✓ server: PostgreSQL 18",
        "  ✗ public.t: has no [key]",
        '      ALTER TABLE "public"."t" REPLICA IDENTITY FULL',
    ]


def test_json_for_machines() -> None:
    decoded = json.loads(as_json([Section("source shop", (OK, WARNING))]))
    assert decoded["ok"] is True
    (section,) = decoded["sections"]
    assert section["title"] == "source shop"
    assert section["findings"][1] == {
        "level": "warning",
        "subject": "fsync",
        "message": "is off",
        "fix": "set fsync = on",
    }
    assert json.loads(as_json([Section("source shop", (ERROR,))]))["ok"] is False


def configured(data_dir: Path, *, max_bytes: int = 0, min_free_bytes: int = 0) -> Config:
    raw = {
        "daemon": {"data_dir": str(data_dir)},
        "queue": {"max_bytes": max_bytes, "min_free_bytes": min_free_bytes},
        "sources": {"shop": {"url": "postgresql:///shop"}},
    }
    return parse(raw, {})


@pytest.mark.parametrize(
    ("max_bytes", "min_free_bytes", "level"), [(0, 0, "ok"), (2**60, 0, "warning"), (0, 2**60, "error")]
)
def test_room_for_the_queue(tmp_path: Path, max_bytes: int, min_free_bytes: int, level: str) -> None:
    config = configured(tmp_path / "not" / "yet", max_bytes=max_bytes, min_free_bytes=min_free_bytes)
    assert [finding.level for finding in check_data_dir(config)] == [level]
    assert list(tmp_path.iterdir()) == []


def test_data_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = check_data_dir(configured(tmp_path / "file" / "data"))
    assert (finding.level, finding.subject) == ("error", "data_dir")
    assert "is not a folder" in finding.message
    assert finding.fix == "set daemon.data_dir to another folder"


def test_data_dir_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    for folder, fix in (
        (tmp_path, f"chown -R {os.geteuid()} {tmp_path}"),
        (tmp_path / "a b" / "data", f"install -d -o {os.geteuid()} '{tmp_path}/a b/data'"),
    ):
        (finding,) = check_data_dir(configured(folder))
        assert finding.level == "error"
        assert finding.fix == f"as root: {fix}"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("FATAL: unsupported startup parameter: options", "connect to the server itself"),
        ("FATAL: unsupported startup parameter in options: row_security", "connect to the server itself"),
        ("FATAL: permission denied to start WAL sender", "REPLICATION"),
        ("FATAL: must be superuser or replication role to start walsender", "REPLICATION"),
        ('FATAL: role "nobody" does not exist', "pg_hba.conf"),
        ('FATAL: database "nothing" does not exist', "create the database"),
    ],
)
def test_refused_connections_are_not_tried_for_ever(text: str, hint: str) -> None:
    error = sorted_error(None, f"connection failed: {text}", connection_lost=True)
    assert isinstance(error, FatalError)
    assert hint in error.hint
