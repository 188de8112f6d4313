"""One contract for all stores of the feed (`cdc.feed.store`)."""

from __future__ import annotations

import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdc.errors import ConfigError, TransientError
from cdc.feed.gap import Gap, find_gap
from cdc.feed.place import Place, reader, writer
from cdc.feed.record import ChangeType, Pruned
from cdc.feed.store import FeedReader, Wanted
from cdc.feed.writer import Locked
from cdc.position import Position
from tests.conftest import NewDatabase
from tests.feed_stores import (
    ALL,
    LIMIT,
    START,
    Poller,
    change,
    event,
    numbered_from_one,
    opened,
    patiently,
    place_at,
    read_all,
    state,
    with_database,
    write,
)

STORES = ["sqlite", "pg18", "pg16", "mongodb"]
LATER = 2**50
"""Microseconds; in 2005, and behind that."""


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path, new_database: NewDatabase) -> Place:
    """Where there is no feed yet, but in SQLite: there it is empty, and made as its ids are counted elsewhere."""
    if request.param == "sqlite":
        return numbered_from_one(place_at(None, tmp_path))
    if request.param == "mongodb":
        name = request.getfixturevalue("mongo_database").name
        return place_at(with_database(request.getfixturevalue("mongodb"), name), tmp_path)
    server = request.getfixturevalue(request.param.replace("pg", "postgres"))
    return place_at(new_database(server).url, tmp_path)


# positions, transactions


def test_a_source_goes_on_where_its_last_commit_left_it(place: Place) -> None:
    first = writer(place, "shop")
    assert first.open() is None
    first.begin(START)
    first.close()
    assert first.open() == START
    write(first, change(1), seq=5)
    first.close()
    first.close()
    with opened(place, "other") as other:
        assert other.open() == START
    second = writer(place, "shop")
    assert second.open() == Position("q", 5, 6)
    second.forget()
    assert second.open() is None
    second.close()


def test_a_resume_token_is_a_position(place: Place) -> None:
    token = Position("q", 3, b"\x05\0\0\0\0")
    with opened(place, "shop") as to:
        to.append([change(1)], [])
        to.commit(token)
        assert to.open() == token


def test_nothing_is_seen_before_the_commit_and_all_of_it_after(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        to.append([change(1), change(2)], [state(1)])
        to.append([change(3)], [])
        assert (feed.head(), read_all(feed), feed.oldest()) == (0, [], None)
        to.commit(Position("q", 1, 2))
        assert [record.id for record in read_all(feed)] == [1, 2, 3]
        assert (feed.head(), feed.oldest()) == (3, 1)


def test_what_was_not_committed_leaves_nothing(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        to.append([change(1)], [state(1)])
        assert to.states([("Product", "1")]) == {("Product", "1"): state(1)}
        to.close()
        assert to.open() == START
        assert to.states([("Product", "1")]) == {}
        to.commit(Position("q", 1, 2))
        assert read_all(feed) == []
        write(to, change(1), seq=2)
        assert [record.id for record in read_all(feed)] == [1]


def test_a_transaction_without_records_moves_the_position(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        to.append([], [])
        to.commit(Position("q", 7, 8))
        assert to.open() == Position("q", 7, 8)
        assert feed.head() == 0


def test_f116_another_writer_of_the_source_is_noticed(place: Place, feed: FeedReader) -> None:
    with opened(place) as old, opened(place) as new:
        write(new, change(1))
        with pytest.raises(TransientError, match="someone else"):
            old.states([("Product", "1")])
        with pytest.raises(TransientError, match="not open"):
            old.append([change(2)], [])
        assert old.open() == Position("q", 1, 2)
        assert old.states([("Product", "1")]) == {("Product", "1"): state(1)}
        write(old, change(2), seq=2)
        assert [record.position for record in read_all(feed)] == ["0/1:0", "0/2:0"]


def test_two_that_begin_at_once_do_not_both_succeed(place: Place) -> None:
    one, two = writer(place, "shop"), writer(place, "shop")
    assert one.open() is None
    assert two.open() is None
    one.begin(START)
    with pytest.raises(TransientError):
        two.begin(Position("q", 9, 9))
    assert two.open() == START
    one.close()
    two.close()


# records


JSON = [
    b'{"id":17,"price":12.50,"name":"\xc3\xa4 \xf0\x9f\x8d\x90 \\"q\\" \\\\ \\n \\t","none":null,"yes":true}',
    b'{"big":123456789012345678901234567890,"long":9223372036854775807,"deep":[[{"a":[1,2,{}]}]],"empty":{}}',
    b'{"digits":0.10000000000000000000000000000000000001,"huge":1e400,"tiny":-0.0,"exp":1E+2}',
    b'{"twice":1,"twice":2,"a.b":1,"":0}',
    b'{"_id":{"$oid":"5f0000000000000000000000"},"$x":1}',
    b'{"zero":"a\\u0000b","half":"\\ud83d"}',
    b'{"spaces" : [ 1 , 2 ]}',
    b'{"nested":' + b'{"x":' * 150 + b"1" + b"}" * 150 + b"}",
]


@pytest.mark.parametrize("json", JSON, ids=range(len(JSON)))
def test_a_record_is_read_as_it_was_written(place: Place, feed: FeedReader, json: bytes) -> None:
    full = change(
        1,
        change_type=ChangeType.UPDATE,
        version=2**40,
        event="ordered",
        location_id="nørth '\"\\;--",
        user_id="u\t5\n",
        before=json,
        after=json,
        changed=("price", 'a,b"}{\\', ""),
        delta=json,
        lookup=True,
        truncated=True,
        scope_before=json,
        scope_after=json,
    )
    with opened(place) as to:
        write(to, full, change(2, changed=(), after=None, changed_at=1_763_759_000_123_456))
        first, second = read_all(feed)
    assert first == msgspec.structs.replace(full, id=1, recorded_at=first.recorded_at)
    assert second == change(
        2, id=2, changed=(), after=None, changed_at=1_763_759_000_123_456, recorded_at=first.recorded_at
    )
    assert list(feed.history("Product", "1", None, 1)) == [first]


def test_a_record_that_is_there_adds_nothing(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        write(to, change(1), change(2))
        to.open()
        write(to, change(1), change(2), seq=2)
        write(to, change(2), change(3), change(3), change(4), seq=3)
        write(to, change(4, source="shop"), seq=4)
    with opened(place, "other") as other:
        write(other, change(1, source="other"))
    assert [(record.id, record.source, record.position) for record in read_all(feed)] == [
        (1, "shop", "0/1:0"),
        (2, "shop", "0/2:0"),
        (3, "shop", "0/3:0"),
        (4, "shop", "0/4:0"),
        (5, "other", "0/1:0"),
    ]
    assert feed.head() == 5


@pytest.mark.parametrize("again", [[1], [3, 1]])
def test_a_replay_that_nobody_expects_adds_nothing(place: Place, feed: FeedReader, again: list[int]) -> None:
    with opened(place) as to:
        write(to, change(1))
        write(to, change(2), seq=2)

        def attempt() -> None:
            to.open()
            to.append([change(4)], [])
            to.append([change(number) for number in again], [])
            to.commit(Position("q", 3, 4))

        patiently(attempt)
    assert {record.position for record in read_all(feed)} == {f"0/{number:X}:0" for number in {1, 2, 4, *again}}
    assert [record.id for record in read_all(feed)] == list(range(1, feed.head() + 1))


def test_states_are_kept_whatever_their_keys(place: Place) -> None:
    keys = ["1", "a\0b", "a\N{SYMBOL FOR NULL}b", '{"a":"\\""}', "ä\t", "", "x" * 900]
    states = [
        state(0, number, key=key, location_id=f"l{number}", scope=b'{"c":"\xc3\xa4"}', known=bytes(range(256)))
        for number, key in enumerate(keys, 1)
    ]
    states += [state(0, 9, key="1", entity_type="Other")]
    with opened(place) as to, opened(place, "other") as other:
        to.append([], [state(0, 77, key="1"), *states])
        to.commit(Position("q", 1, 2))
        wanted = {(each.entity_type, each.key): each for each in states}
        assert to.states([*wanted, ("Product", "none")]) == wanted
        to.open()  # so that nothing is remembered
        assert to.states([*wanted, ("Product", "none")]) == wanted
        to.close()
        assert other.states(list(wanted)) == {}


def test_who_asked_for_states_that_were_not_there_keeps_them_all_the_same(place: Place) -> None:
    """What is known to be new is written in another way."""
    keys = ["a\0b", '{"a":"\\""}', "ä\t", "", *map(str, range(2_100))]
    first = {("Product", key): state(0, 1, key=key, location_id="a\tb", scope=b'{"c":"\\u0000"}') for key in keys}
    second = {key: state(0, 2, key=key[1], known=b"\0\xff") for key in list(first)[::2]}
    with opened(place) as to:
        assert to.states([*first]) == {}
        to.append([], [*first.values(), *second.values()])  # the later of two is the one that counts
        assert to.states([*first]) == first | second
        to.append([], list(first.values()))
        to.commit(Position("q", 1, 2))
        to.open()  # so that nothing is remembered
        assert to.states([*first, ("Other", "1")]) == first
        to.append([], [state(0, 1, key="1", entity_type="Other"), *second.values()])
        to.commit(Position("q", 2, 4))
        to.open()
        assert to.states([*first]) == first | second


def test_what_only_some_records_have_is_nobody_elses(place: Place, feed: FeedReader) -> None:
    told = [change(1), change(2, location_id="north", after=None), change(3, delta=b"{}", changed=("a",)), change(4)]
    with opened(place) as to:
        write(to, *told)
        found = read_all(feed)
    assert [msgspec.structs.replace(each, id=0, recorded_at=0) for each in found] == told


def test_who_forgets_a_position_knows_no_documents_either(place: Place) -> None:
    """They may change before it begins again; versions and scopes are needed all the same."""
    told = state(1, 7, scope=b"{}", known=b"document")
    with opened(place) as to, opened(place, "other") as other:
        for each in (to, other):
            patiently(lambda each=each: each.append([], [told]))  # type: ignore[misc]
            each.commit(Position("q", 1, 2))
        to.forget()
        assert to.open() is None
        to.begin(START)
        key = (told.entity_type, told.key)
        assert to.states([key]) == {key: msgspec.structs.replace(told, known=None)}
        to.close()
        other.open()
        assert other.states([key]) == {key: told}


# order


def test_ids_are_seen_in_order_when_one_writer_commits_late(place: Place, feed: FeedReader) -> None:
    with opened(place, "late") as late, opened(place, "quick") as quick, ThreadPoolExecutor() as threads:
        pollers = [Poller(feed, 3) for _ in range(3)]
        for poller in pollers:
            poller.start()
        late.append([change(1, source="late")], [])
        at_it = threading.Event()

        def hurry() -> None:
            def attempt() -> None:
                quick.open()
                at_it.set()
                quick.append([change(2, source="quick")], [])
                quick.commit(Position("q", 1, 2))

            patiently(attempt)

        hurried = threads.submit(hurry)
        published = threads.submit(lambda: patiently(lambda: quick.publish(event("e1"))))
        assert at_it.wait(30)
        late.append([change(3, source="late")], [])
        assert feed.head() == 0
        late.commit(Position("q", 1, 2))
        hurried.result()
        published.result()
        assert [poller.stop()[:2] for poller in pollers] == [[1, 2]] * 3
        assert [record.source for record in feed.scan(0, ALL, 2).records] == ["late", "late"]
        assert [record.id for record in read_all(feed)] == [1, 2, 3, 4]


def test_every_reader_sees_every_record_once_and_in_order(place: Place, feed: FeedReader) -> None:
    """Two sources, and what is published, while three readers follow."""
    rounds = 12
    pollers = [Poller(feed, 5 * rounds) for _ in range(3)]
    for poller in pollers:
        poller.start()

    def write_all(source: str) -> None:
        with opened(place, source) as to:
            for number in range(1, rounds + 1):

                def attempt(number: int = number) -> None:
                    to.open()
                    records = [change(2 * number + each, source=source) for each in (0, 1)]
                    write(to, *records, seq=number)

                patiently(attempt)

    def publish_all() -> None:
        to = writer(place, "@publish")
        for number in range(rounds):
            patiently(partial(to.publish, event(f"e{number}")))
        to.close()

    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(write_all, "one"), threads.submit(write_all, "two"), threads.submit(publish_all)]:
            done.result()
    assert [poller.stop() for poller in pollers] == [list(range(1, 5 * rounds + 1))] * 3
    recorded = [record.recorded_at for record in read_all(feed)]
    assert recorded == sorted(recorded)
    versions = [record.version for record in read_all(feed) if record.entity_type == "Client"]
    assert versions == list(range(1, rounds + 1))


def open_and_write(place: Place, source: str) -> None:
    """In a process of its own."""

    def attempt() -> None:
        with opened(place, source) as to:
            write(to, change(1, source=source))

    patiently(attempt)


def test_processes_may_begin_at_once(place: Place) -> None:
    sources = ["one", "two", "three"]
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as processes:
        list(processes.map(open_and_write, [place] * 3, sources))
    found = reader(place)
    found.open()
    records = read_all(found)
    assert [record.id for record in records] == [1, 2, 3]
    assert sorted(record.source for record in records) == sorted(sources)
    found.close()


def test_recorded_at_never_decreases(place: Place, feed: FeedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(place) as to:
        write(to, change(1))
        connect = type(to)._connect  # type: ignore[attr-defined]

        def connect_with_wrong_clock(self: Any) -> Any:
            session = connect(self)
            lock = session.lock

            def lock_long_ago(source: str) -> Locked:
                found: Locked = lock(source)
                return msgspec.structs.replace(found, now=1)

            session.lock = lock_long_ago
            return session

        monkeypatch.setattr(type(to), "_connect", connect_with_wrong_clock)
        to.open()
        write(to, change(2), seq=2)
    first, second = read_all(feed)
    assert first.recorded_at == second.recorded_at > LATER


# publishing


def test_what_is_published_is_stored_once_with_the_next_version(place: Place, feed: FeedReader) -> None:
    to = writer(place, "@publish")
    first = to.publish(event("e1", event="promoted", change_type=ChangeType.EVENT, scope_after=b'{"c":"x"}'))
    assert first is not None
    assert (first.id, first.version) == (1, 1)
    assert to.publish(event("e1")) is None
    assert to.publish(event("e2", entity_id="8")) == read_all(feed)[1]
    second = to.publish(event("e3", location_id="a\0b"))
    assert second is not None
    assert (second.id, second.version) == (3, 2)
    assert read_all(feed)[0] == first
    to.close()
    assert to.publish(event("e3")) is None
    to.close()


def test_publishing_needs_no_feed_to_be_there(place: Place) -> None:
    to = writer(place, "@publish")
    assert to.publish(event("e1")) is not None
    found = reader(place)
    found.open()
    assert found.head() == 1
    found.close()
    to.close()


# reading


def test_a_reader_waits_for_the_feed(place: Place) -> None:
    place = msgspec.structs.replace(place, table="none_yet")
    found = reader(place)
    with pytest.raises(TransientError):
        found.open()
    with opened(place):
        found.open()
        assert read_all(found) == []
    found.close()
    found.close()


def test_a_scan_tells_how_far_it_looked(place: Place, feed: FeedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.feed.tables.SCAN_ROWS", 10)
    with opened(place) as to:
        types = ["Product"] * 25 + ["Order"] * 2
        write(to, *(change(n, entity_type=kind, location_id=f"l{n % 2}") for n, kind in enumerate(types, 1)))

    def scan(after: int, limit: int = LIMIT, **wanted: Any) -> tuple[list[int], int, bool]:
        found = feed.scan(after, Wanted(**wanted), limit)
        return [record.id for record in found.records], found.cursor, found.more

    assert scan(0, 3) == ([1, 2, 3], 3, True)
    assert scan(24, 3) == ([25, 26, 27], 27, False)
    assert scan(27) == ([], 27, False)
    assert scan(99) == ([], 99, False)
    orders: dict[str, Any] = {"entity_types": frozenset({"Order", "None"})}
    assert scan(0, **orders) == ([], 10, True)
    assert scan(10, **orders) == ([], 20, True)
    assert scan(20, **orders) == ([26, 27], 27, False)
    assert scan(17, **orders) == ([26, 27], 27, False)
    assert scan(16, **orders) == ([26], 26, True)
    assert scan(20, 1, **orders) == ([26], 26, True)
    assert scan(0, location_id="l0") == ([2, 4, 6, 8, 10], 10, True)
    assert scan(0, 2, location_id="l0") == ([2, 4], 4, True)
    assert scan(0, channels=frozenset({"products"}))[0] == list(range(1, 11))
    assert scan(20, channels=frozenset({"others"})) == ([], 27, False)
    assert scan(20, channels=frozenset()) == ([], 27, False)
    assert scan(20, location_id="l1", **orders) == ([27], 27, False)
    assert scan(20, location_id="a\0b") == ([], 27, False)


def test_the_history_of_an_entity_goes_back(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        records = [change(n, entity_id="7" if n % 2 else "8", version=n) for n in range(1, 10)]
        write(to, *records, change(10, entity_type="Other", entity_id="7"))
    history = feed.history
    assert [record.id for record in history("Product", "7", None, LIMIT)] == [9, 7, 5, 3, 1]
    assert [record.id for record in history("Product", "7", 7, 2)] == [5, 3]
    assert list(history("Product", "none", None, LIMIT)) == []
    assert list(history("Pro\0duct", "7", None, LIMIT)) == []


def test_a_time_is_a_cursor(place: Place, feed: FeedReader) -> None:
    assert feed.cursor_at(LATER) == 0
    with opened(place) as to:
        write(to, change(1), change(2))
        first = read_all(feed)[0].recorded_at
        for number in range(3, 100):
            write(to, change(number), seq=number)
            if (last := read_all(feed)[-1].recorded_at) > first:
                break
    assert last > first
    assert feed.cursor_at(LATER) == feed.cursor_at(first) == 0
    assert (
        feed.cursor_at(last)
        == feed.cursor_at(first + 1)
        == next(record.id - 1 for record in read_all(feed) if record.recorded_at == last)
    )
    assert feed.cursor_at(last + 1) == feed.head()


def test_the_types_of_which_there_are_records(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        assert list(to.entity_types()) == []
        write(to, *(change(n, entity_type=kind) for n, kind in enumerate(["b", "a", "b", "c"])))
        assert sorted(to.entity_types()) == ["a", "b", "c"]


# retention


def test_f104_channels_are_told_apart(place: Place, feed: FeedReader) -> None:
    """What was removed of one channel is no gap for who follows another of the same type."""
    with opened(place) as to:
        write(to, *(change(n, channel=channel) for n, channel in enumerate(["a", "b", "a"], 1)))
        recorded_at = read_all(feed)[0].recorded_at
        assert to.prune(None, recorded_at + 1, 2) == 2
        assert find_gap(feed, 0, Wanted(channels=frozenset("a"))) == Gap(oldest=2, cursor=1)
        assert find_gap(feed, 1, Wanted(channels=frozenset("a"))) is None
        assert find_gap(feed, 1, Wanted(channels=frozenset("b"))) == Gap(oldest=3, cursor=2)
        assert find_gap(feed, 0, Wanted(channels=frozenset("c"))) is None


def test_f104_what_was_pruned_is_remembered(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        types = ["Product", "Order"] * 5
        write(to, *(change(n, entity_type=kind) for n, kind in enumerate(types, 1)))
        recorded_at = read_all(feed)[0].recorded_at
        assert to.prune(None, recorded_at, 100) == 0
        assert feed.pruned() == {}
        assert to.prune("Order", recorded_at + 1, 2) == 2
        assert {kind: each for (kind, _), each in feed.pruned().items()} == {"Order": Pruned(4, recorded_at, 2)}
        assert [record.id for record in read_all(feed)] == [1, 3, 5, 6, 7, 8, 9, 10]
        assert to.prune(None, recorded_at + 1, 3) == 3
        assert {kind: each for (kind, _), each in feed.pruned().items()} == {
            "Order": Pruned(4, recorded_at, 2),
            "Product": Pruned(5, recorded_at, 3),
        }
        assert feed.oldest() == 6
        assert to.prune("None", recorded_at + 1, 3) == 0
        assert to.prune("Product", recorded_at + 1, 1) == 1
        assert to.prune("Order", recorded_at + 1, 100) == 3
        assert {kind: each for (kind, _), each in feed.pruned().items()} == {
            "Order": Pruned(10, recorded_at, 5),
            "Product": Pruned(7, recorded_at, 4),
        }


def test_f104_ids_and_versions_go_on_after_all_was_pruned(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        write(to, change(1), change(2))
        to.publish(event("e1"))
        assert to.prune(None, 2**51, 100) == 3
        assert (read_all(feed), feed.oldest(), feed.head()) == ([], None, 3)
        assert (feed.cursor_at(LATER), feed.scan(1, ALL, 10).more) == (3, False)
    with opened(place) as to:
        assert to.states([("Product", "1")]) == {("Product", "1"): state(1)}
        write(to, change(3), seq=2)
        published = to.publish(event("e2"))
        assert published is not None
        assert (published.id, published.version) == (5, 2)
    assert [record.id for record in read_all(feed)] == [4, 5]


# news


def test_news_wakes_a_listener(place: Place, feed: FeedReader) -> None:
    with opened(place) as to, feed.listen() as listener, ThreadPoolExecutor() as threads:
        assert listener.wait(0) in {True, False}
        waiting = threads.submit(listener.wait, 60)
        write(to, change(1))
        assert waiting.result(30)
        assert feed.head() == 1
        while listener.wait(0):
            pass  # it may wake without need, but not for ever
        waiting = threads.submit(listener.wait, 60)
        to.publish(event("e1"))
        assert waiting.result(30)


def test_what_was_committed_before_waiting_is_news(place: Place, feed: FeedReader) -> None:
    with opened(place) as to, feed.listen() as listener:
        write(to, change(1))
        assert listener.wait(60)


def test_news_of_another_process_wakes_a_listener(place: Place, feed: FeedReader) -> None:
    with feed.listen() as listener, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        done = processes.submit(open_and_write, place, "another")
        while feed.head() == 0:
            assert listener.wait(60)
        done.result()


# names


@pytest.mark.parametrize("table", ["", "a b", 'a"b', "1a", "a.b.c", "é", "x" * 41, "a/b", "../a", ".a"])
def test_a_table_has_a_plain_name(place: Place, table: str) -> None:
    wrong = msgspec.structs.replace(place, table=table)
    with pytest.raises(ConfigError):
        writer(wrong, "shop").open()
    with pytest.raises(ConfigError):
        reader(wrong).open()


def test_feeds_stand_side_by_side(place: Place, feed: FeedReader) -> None:
    other = msgspec.structs.replace(place, table="Sync_Log")
    with opened(other) as to:
        write(to, change(1))
    assert feed.head() == 0
    found = reader(other)
    found.open()
    assert [record.entity_id for record in read_all(found)] == ["1"]
    found.close()


def test_a_writer_that_is_closed_says_so(place: Place) -> None:
    place = msgspec.structs.replace(place, table="none_yet")
    to = writer(place, "shop")
    for action in (
        lambda: to.begin(START),
        lambda: to.states([("Product", "1")]),
        lambda: to.append([], []),
        lambda: to.commit(START),
    ):
        with pytest.raises(TransientError):
            action()
    with pytest.raises(TransientError):
        reader(place).head()
