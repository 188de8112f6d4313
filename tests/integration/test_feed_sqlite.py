"""What is special to a feed in an SQLite file."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cdc.errors import FatalError, PermanentError, TransientError
from cdc.feed.place import Place, reader, writer
from cdc.feed.store import FeedReader
from cdc.position import Position
from tests.feed_stores import START, change, event, opened, place_at, read_all, state, write


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_at(None, tmp_path)


def told(feed: FeedReader) -> list[str]:
    """Of which entities."""
    return [record.entity_id for record in read_all(feed)]


def test_only_its_owner_can_read_the_file(place: Place) -> None:
    with opened(place) as to:
        write(to, change(1))
        modes = {stat.S_IMODE(file.stat().st_mode) for file in place.directory.iterdir()}
        assert modes == {0o600}
    assert {file.name.removeprefix("data_changes.sqlite") for file in place.directory.iterdir()} <= {"", "-wal", "-shm"}


def test_the_directory_must_be_there(tmp_path: Path) -> None:
    place = place_at(None, tmp_path / "none")
    with pytest.raises(FatalError, match="No such file") as caught:
        writer(place, "shop").open()
    assert f"{place.directory} is gone" in caught.value.hint
    with pytest.raises(TransientError):
        reader(place).open()


def test_a_reader_cannot_write(place: Place) -> None:
    with opened(place):
        found = reader(place)
        found.open()
        with found._connection() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):  # type: ignore[attr-defined]
            connection.execute("DELETE FROM data_changes")
        found.close()


def test_commits_are_fsynced(place: Place) -> None:
    with opened(place) as to:
        connection = to._session._connection  # type: ignore[attr-defined]
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_table_is_for_people_too(place: Place) -> None:
    with opened(place) as to:
        write(to, change(1, after=b'{"price":12.50}', changed=("price",)))
    query = "SELECT entity_type, changed_at, recorded_at > '2026', after ->> 'price', changed FROM data_changes"
    with closing(sqlite3.connect(place.file)) as connection:
        assert connection.execute(query).fetchall() == [
            ("Product", "2025-11-21T21:03:20.000001Z", 1, 12.5, '["price"]')
        ]


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE data_changes (id INTEGER PRIMARY KEY, mine TEXT)",
        "CREATE TABLE data_changes_state (mine TEXT)",
        "CREATE TABLE users (id INTEGER)",
        "",
    ],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(place: Place, script: str) -> None:
    with closing(sqlite3.connect(place.file)) as connection:
        connection.executescript(script)
    place.file.touch()
    before = place.file.read_bytes()
    with pytest.raises(FatalError, match="is not a feed"):
        writer(place, "shop").open()
    with pytest.raises(FatalError, match="is not a feed"):
        reader(place).open()
    assert place.file.read_bytes() == before


def test_no_database_at_all_is_refused(place: Place) -> None:
    place.file.write_bytes(b"not a database" * 100)
    with pytest.raises(FatalError):
        writer(place, "shop").open()
    assert place.file.read_bytes() == b"not a database" * 100


def test_an_unknown_format_is_left_as_it_is(place: Place) -> None:
    with opened(place):
        pass
    with closing(sqlite3.connect(place.file)) as connection, connection:
        connection.execute("UPDATE data_changes_state SET format = 99")
    for attempt in (writer(place, "shop").open, reader(place).open):
        with pytest.raises(FatalError, match="format 99"):
            attempt()
    with closing(sqlite3.connect(place.file)) as connection:
        assert connection.execute("SELECT format FROM data_changes_state").fetchall() == [(99,)]


def test_a_counter_behind_its_rows_is_noticed(place: Place) -> None:
    with opened(place) as to:
        write(to, change(1), change(2))
        with closing(sqlite3.connect(place.file)) as connection, connection:
            connection.execute("UPDATE data_changes_state SET last_id = last_id - 1")
        with pytest.raises(PermanentError):
            write(to, change(3), seq=2)


def write_half(place: Place, ready: Connection) -> None:
    """In a process of its own: commit one transaction, and leave another one open."""
    to = writer(place, "shop")
    to.open()
    to.begin(START)
    write(to, change(1))
    to.append([change(2)], [state(2)])
    ready.send(None)
    signal.pause()


def test_what_a_killed_writer_left_open_is_gone(place: Place) -> None:
    processes = get_context("spawn")
    here, there = processes.Pipe()
    process = processes.Process(target=write_half, args=(place, there), daemon=True)
    process.start()
    assert here.poll(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = reader(place)
    found.open()
    assert told(found) == ["1"]
    with opened(place) as to:
        assert to.open() == Position("q", 1, 2)
        assert to.states([("Product", "2")]) == {}
        write(to, change(2), seq=2)
        assert told(found) == ["1", "2"]
    found.close()


def test_a_full_disk_is_waited_for_whatever_it_hits(place: Place) -> None:
    """SQLite ends the whole transaction then, savepoints included."""
    with opened(place) as to:
        connection = to._session._connection  # type: ignore[attr-defined]
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 10}")
        with pytest.raises(TransientError, match="full"):
            to.append([change(number, after=b'{"x":"%s"}' % (b"x" * 20_000)) for number in range(20)], [])
        to.open()
        write(to, change(1))
    found = reader(place)
    assert told(found) == ["1"]
    found.close()


def test_a_log_without_its_file_does_not_come_into_the_next_one(place: Place) -> None:
    with opened(place) as killed:  # not closed: its log is not in the file yet
        write(killed, change(1), change(2))
        place.file.unlink()
        with opened(place) as to:
            write(to, change(3))
            found = reader(place)
            assert told(found) == ["3"]
            found.close()


def test_a_file_that_is_removed_is_noticed(place: Place) -> None:
    with opened(place) as to, opened(place, "other") as other:
        write(to, change(1))
        found = reader(place)
        with found.listen() as listener:
            assert len(read_all(found)) == 1
            for file in place.directory.iterdir():
                file.unlink()
            with pytest.raises(TransientError, match="removed"):
                write(to, change(2), seq=2)
            with pytest.raises(TransientError, match="no feed"):
                read_all(found)
            with pytest.raises(TransientError, match="removed"):
                listener.wait(1)
        assert to.open() is None, "a new feed, in which nobody has begun"
        published = other.publish(event("p"))
        assert published is not None
        assert told(found) == ["7"]
        found.close()
