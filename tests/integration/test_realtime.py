"""WebSockets and event streams of a feed: real server, real sockets, and the embedded store."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cdc.api.feed import Feed
from cdc.feed.place import Place, writer
from cdc.feed.record import PUBLISHED, ChangeType
from cdc.http_config import Http, TokenConfig
from cdc.secret import Token
from cdc.testing_feed import MemoryFeed
from tests.gateway import Gateway, Source, closed, events, receive, record, subscribe
from tests.processes import wait_until


def test_subscriber_gets_what_is_committed_from_now_on(gateway: Gateway, source: Source) -> None:
    source.commit(record("orders", 1))
    wait_until(lambda: gateway.feed.head == 1)
    with gateway.websocket() as client:
        assert subscribe(client, "orders", "clients") == {
            "type": "subscribed",
            "cursors": {"orders": "1", "clients": "1"},
        }
        source.commit(record("orders", 7, 2, location_id="north", changed=("status",)), record("products", 1))
        assert receive(client) == {
            "type": "events",
            "channel": "orders",
            "events": [
                {
                    "channel": "orders",
                    "event": "updated",
                    "id": "7",
                    "data": {"id": 7, "version": 2},
                    "cursor": "2",
                    "entityType": "Orders",
                    "changeType": "UPDATE",
                    "version": 2,
                    "changedAt": "2023-11-14T22:13:20.000000Z",
                    "locationId": "north",
                    "userId": None,
                    "changed": ["status"],
                }
            ],
        }


def test_missed_events_come_first_then_live_ones(gateway: Gateway, source: Source) -> None:
    for version in range(1, 1_001):
        source.commit(record("orders", version % 7, version), record("clients", 1, version))
    with gateway.websocket() as client:
        assert subscribe(client, "orders", since={"orders": "201"})["cursors"] == {"orders": "201"}
        source.commit(record("orders", 0, 1_001))
        assert [event["version"] for event in events(client, 900)] == list(range(102, 1_002))


def test_deleted_shows_what_was_last_known(gateway: Gateway, source: Source) -> None:
    with gateway.websocket() as client:
        subscribe(client, "orders")
        source.commit(record("orders", change_type=ChangeType.DELETE, before=b'{"id": 1}', after=None))
        (event,) = events(client, 1)
    assert (event["event"], event["data"]) == ("deleted", {"id": 1})


def test_all_channels(gateway: Gateway, source: Source) -> None:
    with gateway.websocket() as client:
        subscribe(client, "*")
        source.commit(record("orders"), record("clients"), record("orders"))
        message = receive(client)
    assert message["channel"] == "*"
    assert [event["channel"] for event in message["events"]] == ["orders", "clients", "orders"]


def test_unsubscribed_channel_is_silent_and_can_be_resumed(gateway: Gateway, source: Source) -> None:
    with gateway.websocket() as client:
        subscribe(client, "orders", "clients")
        client.send('{"type": "unsubscribe", "channels": ["orders", "nothing"]}')
        assert receive(client) == {"type": "unsubscribed", "channels": ["orders"]}
        source.commit(record("orders"), record("clients"))
        assert [event["channel"] for event in events(client, 1)] == ["clients"]
        subscribe(client, "orders", since={"orders": "0"})
        assert [event["channel"] for event in events(client, 1)] == ["orders"]


def test_published_events_reach_streams_of_every_gateway(place: Place, gateway: Gateway) -> None:
    publisher = writer(place, PUBLISHED)
    with Gateway(Feed.at(place)) as other, gateway.websocket() as first, other.websocket() as second:
        subscribe(first, "clients")
        subscribe(second, "clients")
        publisher.publish(record("clients", source=PUBLISHED, change_type=ChangeType.EVENT, event="greeted"))
        assert [events(client, 1)[0]["event"] for client in (first, second)] == ["greeted", "greeted"]
    publisher.close()


def test_ping(gateway: Gateway) -> None:
    with gateway.websocket() as client:
        client.send('{"type": "ping", "id": 5}')
        assert receive(client) == {"type": "pong", "id": 5}


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        "null",
        '{"type": "shout"}',
        '{"type": "subscribe"}',
        '{"type": "subscribe", "channels": []}',
        '{"type": "subscribe", "channels": [""]}',
        '{"type": "subscribe", "channels": ["%s"]}' % ("x" * 201),
        '{"type": "subscribe", "channels": [1]}',
        '{"type": "subscribe", "channels": ["a"], "since": {"a": 5}}',
        '{"type": "subscribe", "channels": ["a"], "since": {"a": "-5"}}',
        '{"type": "subscribe", "channels": ["a"], "since": {"a": "%s"}}' % ("9" * 20),
        '{{"type": "subscribe", "channels": [{}]}}'.format(",".join(f'"{each}"' for each in range(101))),
        '{"type": "ping", "id": %s}' % ("[" * 10_000),
    ],
)
def test_bad_message_is_an_error_that_says_why(gateway: Gateway, message: str) -> None:
    with gateway.websocket() as client:
        client.send(message)
        answer = receive(client)
        assert (answer["type"], bool(answer["error"])) == ("error", True)
        client.send('{"type": "ping"}')
        assert receive(client)["type"] == "pong"


def test_subscriptions_of_one_client_are_limited(gateway: Gateway) -> None:
    with gateway.websocket() as client:
        assert subscribe(client, *map(str, range(60)))["type"] == "subscribed"
        assert subscribe(client, *map(str, range(50, 111)))["type"] == "error"
        assert subscribe(client, *map(str, range(50, 100)))["type"] == "subscribed"
    wait_until(lambda: not gateway.stats()["connections"])


def test_nothing_is_read_for_nobody_and_everything_for_who_comes(gateway: Gateway, source: Source) -> None:
    source.commit(*(record("orders", each) for each in range(1, 4)))
    wait_until(lambda: gateway.feed.ring.head == 3)
    assert gateway.feed.ring.after(2, 1) is None
    with gateway.websocket() as client:
        subscribe(client, "orders", since={"orders": "1"})
        assert [event["id"] for event in events(client, 2)] == ["2", "3"]
        source.commit(record("orders", 4))
        assert [event["id"] for event in events(client, 1)] == ["4"]
        assert [each.id for each in gateway.feed.ring.after(3, 10) or ()] == [4]
    wait_until(lambda: not gateway.stats()["connections"])
    source.commit(record("orders", 5))
    wait_until(lambda: gateway.feed.ring.head == 5)
    assert gateway.feed.ring.after(4, 1) is None


def test_f104_gap_where_changes_were_removed(gateway: Gateway, source: Source, place: Place) -> None:
    source.commit(*(record("orders", each, recorded_at=each) for each in range(1, 6)))
    wait_until(lambda: gateway.feed.ring.head == 5)
    pruner = writer(place, "pruner")
    pruner.prune(None, 2**51, 3)
    pruner.close()
    with gateway.websocket() as client:
        assert subscribe(client, "orders", since={"orders": "2"}) == {
            "type": "gap",
            "channel": "orders",
            "oldest": "4",
            "cursor": "3",
        }
        assert receive(client) == {"type": "subscribed", "cursors": {}}
        subscribe(client, "orders", since={"orders": "3"})
        assert [event["id"] for event in events(client, 2)] == ["4", "5"]
    with gateway.stream("?since=2") as found:
        assert next(found) == {"id": "3", "event": "gap", "data": '{"oldest":"4","cursor":"3"}'}
        assert [next(found)["id"], next(found)["id"]] == ["4", "5"]


@pytest.mark.parametrize("beyond", ["3", "9223372036854775808", "9999999999999999999"])
def test_f104_cursor_of_another_feed_is_a_gap(gateway: Gateway, source: Source, beyond: str) -> None:
    source.commit(record("orders"), record("orders"))
    with gateway.websocket() as client:
        answer = subscribe(client, "orders", since={"orders": beyond})
        assert (answer["type"], answer["oldest"], answer["cursor"]) == ("gap", "1", "0")
    with gateway.stream(f"?since={beyond}") as found:
        assert [next(found)["event"] for _ in range(3)] == ["gap", "updated", "updated"]


def test_limited_token_sees_its_channels_and_rows(place: Place, source: Source) -> None:
    token = TokenConfig(
        name="limited", token=Token("secret"), scopes=("read",), channels=("orders",), where={"company": "a"}
    )
    mine, other = b'{"company": "a"}', b'{"company": "b"}'
    with (
        Gateway(Feed.at(place), Http(tokens=(token,)), "secret") as gateway,
        gateway.websocket() as client,
        gateway.stream() as stream,
    ):
        assert subscribe(client, "clients")["type"] == "error"
        assert receive(client) == {"type": "subscribed", "cursors": {}}
        subscribe(client, "*")
        source.commit(
            record("orders", 1, scope_before=mine, scope_after=mine),
            record("orders", 2, scope_before=other, scope_after=other),
            record("clients", 3, scope_before=mine, scope_after=mine),
            record("orders", 4, scope_before=mine, scope_after=other, before=b"{}"),
        )
        expected = [("1", "updated"), ("4", "deleted")]
        assert [(event["id"], event["event"]) for event in events(client, 2)] == expected
        found = [json.loads(next(stream)["data"]) for _ in range(2)]
        assert [(event["id"], event["event"]) for event in found] == expected
        assert gateway.stats()["channels"] == {"orders": 2}


def test_stream_is_filtered_and_resumes(gateway: Gateway, source: Source) -> None:
    source.commit(
        record("orders", 1, location_id="north"),
        record("clients", 2, location_id="north"),
        record("orders", 3, location_id="south"),
        record("orders", 4, location_id="north", after=b'{"a":\n1}'),
    )
    query = "?channels=orders,products&entityTypes=Orders&locationId=north&since=0"
    with gateway.stream(query) as found:
        first = next(found)
        assert (first["id"], first["event"], json.loads(first["data"])["id"]) == ("1", "updated", "1")
    with gateway.stream(query, **{"Last-Event-ID": "1"}) as found:
        last = next(found)
        assert (last["id"], json.loads(last["data"])["data"]) == ("4", {"a": 1})


def test_stream_goes_on_live(gateway: Gateway, source: Source) -> None:
    with gateway.stream() as found:
        source.commit(record("orders", 5))
        assert json.loads(next(found)["data"])["id"] == "5"


def test_idle_streams_are_told_their_cursors(gateway: Gateway, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.api.hub.TICK_SECONDS", 0.02)
    monkeypatch.setattr("cdc.api.hub.IDLE_SECONDS", 0.04)
    with gateway.websocket() as client, gateway.stream("?channels=orders") as stream:
        subscribe(client, "orders", "clients")
        source.commit(record("products"))
        assert receive(client) == {"type": "cursors", "cursors": {"orders": "1", "clients": "1"}}
        assert next(stream) == {"id": "1", "event": "cursor", "data": '{"cursor":"1"}'}


def test_streams_outlive_a_store_that_was_away() -> None:
    memory = MemoryFeed()
    source = Source(memory.writer("shop"))
    with Gateway(Feed(memory.reader(), memory.writer(PUBLISHED))) as gateway, gateway.websocket() as client:
        subscribe(client, "orders")
        memory.away = True
        wait_until(lambda: not gateway.feed.connected)
        assert subscribe(client, "clients", since={"clients": "0"})["type"] == "error"
        memory.away = False
        source.commit(record("orders"))
        assert [event["cursor"] for event in events(client, 1)] == ["1"]


def test_replaced_feed_ends_the_streams_and_their_cursors_have_a_gap() -> None:
    memory = MemoryFeed()
    source = Source(memory.writer("shop"))
    source.commit(*(record("orders", each) for each in range(5)))
    with Gateway(Feed(memory.reader(), memory.writer(PUBLISHED))) as gateway:
        with gateway.websocket() as client:
            subscribe(client, "orders")
            memory.away = True
            wait_until(lambda: not gateway.feed.connected)
            memory.records.clear()
            memory.head = 0
            memory.away = False
            source.commit(record("orders"))
            assert closed(client) == 1012
        with gateway.websocket() as client:
            assert subscribe(client, "orders", since={"orders": "5"})["type"] == "gap"


def test_f104_what_is_removed_before_it_was_sent_is_a_gap() -> None:
    memory = MemoryFeed()
    source, pruner = Source(memory.writer("shop")), memory.writer("pruner")
    source.commit(record("orders"))
    with Gateway(Feed(memory.reader(), memory.writer(PUBLISHED))) as gateway:
        scan = gateway.feed.reader.scan

        def late(*args: Any) -> Any:
            if memory.head == 3:
                pruner.prune(None, 2**62, 10)
            return scan(*args)

        gateway.feed.reader.scan = late  # type: ignore[method-assign, assignment]
        with gateway.websocket() as client:
            subscribe(client, "orders")
            source.commit(record("orders"), record("orders"))
            assert closed(client) == 1012
        source.commit(record("orders"))
        with gateway.websocket() as client:
            assert subscribe(client, "orders", since={"orders": "1"})["cursor"] == "3"


def test_streams_end_with_the_service(gateway: Gateway) -> None:
    with gateway.websocket() as client, gateway.stream() as found:
        subscribe(client, "orders")
        gateway.stop()
        assert closed(client) == 1012
        assert list(found) == []
