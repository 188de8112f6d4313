"""Polling, history, publishing and cleaning up: a real server, real sockets, and the embedded store."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from cdc.api.feed import Feed
from cdc.api.requests import MAX_BODY_BYTES
from cdc.feed.place import Place, writer
from cdc.feed.record import ChangeType
from cdc.feed.store import SCAN_ROWS
from cdc.http_config import Http, TokenConfig
from cdc.secret import Token
from tests.feed_stores import numbered_from_one
from tests.gateway import Gateway, Source, event_stream, record
from tests.processes import wait_until

POLL = "/api/changes/poll"
ADMIN = {"Authorization": "Bearer admin-token"}

HTTP = Http(
    tokens=(
        TokenConfig(name="admin", token=Token("admin-token"), scopes=("admin",)),
        TokenConfig(name="orders", token=Token("orders-token"), scopes=("read",), channels=("orders",)),
        TokenConfig(name="ours", token=Token("ours-token"), scopes=("read",), where={"company_id": "7"}),
        TokenConfig(name="tills", token=Token("tills-token"), scopes=("publish",), channels=("tills",)),
    )
)


@pytest.fixture
def gateway(place: Place, source: Source) -> Iterator[Gateway]:
    feed = Feed.at(place)
    with Gateway(feed, HTTP) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers=ADMIN, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an empty feed that stays so: for what is refused."""
    place = numbered_from_one(Place(None, tmp_path_factory.mktemp("feed")))
    Source(writer(place, "shop")).close()
    feed = Feed.at(place)
    with (
        Gateway(feed, HTTP) as gateway,
        httpx.Client(base_url=gateway.url, headers=ADMIN, timeout=30) as client,
    ):
        yield client
        assert poll(client)["cursor"] == "0"


def poll(client: httpx.Client, **query: Any) -> Any:
    answer = client.get(POLL, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(answer: Any) -> list[int]:
    return [change["id"] for change in answer["changes"]]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-token"}


def follow(client: httpx.Client, **query: Any) -> list[Any]:
    """All changes that are there, as an application reads them."""
    found: list[Any] = []
    more = True
    while more:
        answer = poll(client, **query)
        found += answer["changes"]
        query["since"], more = answer["cursor"], answer["hasMore"]
    return found


# --- polling ----------------------------------------------------------------------------------------------------------


def test_a_change_as_it_is_shown(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders", 17, 2, position="0/1", before=b'{"price": 12.50}', after=b'{"price": 12.60}',
                         changed=("price",), location_id="north", user_id="u5"))  # fmt: skip
    answer = client.get(POLL)
    assert '"price": 12.50' in answer.text, "numbers are passed on as they are written"
    (change,) = answer.json()["changes"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(change.pop("recordedAt"))) < timedelta(minutes=1)
    assert change == {
        "id": 1, "entityType": "Orders", "entityId": "17", "changeType": "UPDATE", "channel": "orders",
        "locationId": "north", "userId": "u5", "changedAt": "2023-11-14T22:13:20.000000Z", "source": "shop",
        "position": "0/1", "version": 2, "before": {"price": 12.5}, "after": {"price": 12.6}, "changed": ["price"],
        "delta": None,
    }  # fmt: skip
    assert {name: answer.json()[name] for name in ("cursor", "hasMore")} == {"cursor": "1", "hasMore": False}
    assert datetime.fromisoformat(answer.json()["timestamp"]).tzinfo is not None


def test_pages_follow_each_other(client: httpx.Client, source: Source) -> None:
    source.commit(*(record("orders", number) for number in range(25)))
    first = poll(client, limit=10)
    assert (ids(first), first["cursor"], first["hasMore"]) == (list(range(1, 11)), "10", True)
    assert ids(poll(client, limit=10, since="10")) == list(range(11, 21))
    last = poll(client, limit=10, since="20")
    assert (ids(last), last["cursor"], last["hasMore"]) == (list(range(21, 26)), "25", False)
    nothing = poll(client, since="25")
    assert (nothing["changes"], nothing["cursor"], nothing["hasMore"]) == ([], "25", False)


def test_filters(client: httpx.Client, source: Source) -> None:
    source.commit(
        record("orders", location_id="north"), record("clients"), record("products", location_id="north"),
        record("orders", location_id="south"), record("orders", entity_type="Basket"),
    )  # fmt: skip
    assert ids(poll(client, entityTypes="Orders")) == [1, 4]
    assert ids(poll(client, entityTypes="Orders,Clients")) == [1, 2, 4]
    assert ids(poll(client, channels="orders")) == [1, 4, 5]
    assert ids(poll(client, channels="clients,products", locationId="north")) == [3]
    assert ids(poll(client, locationId="nowhere")) == []


def test_the_cursor_is_how_far_was_looked_not_what_was_found(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"), *(record("clients", number) for number in range(SCAN_ROWS + 100)))
    first = poll(client, channels="orders", since="1")
    assert (first["changes"], first["cursor"], first["hasMore"]) == ([], str(1 + SCAN_ROWS), True)
    assert poll(client, channels="orders", since=first["cursor"])["cursor"] == str(SCAN_ROWS + 101)


def test_a_wait_looks_on_until_something_matches(client: httpx.Client, source: Source) -> None:
    source.commit(*(record("clients", number) for number in range(SCAN_ROWS + 100)), record("orders"))
    assert ids(poll(client, channels="orders", since="0", wait=30)) == [SCAN_ROWS + 101]


def test_since_a_time_means_when_it_was_recorded(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders", 1))
    earlier = client.get(POLL).json()["changes"][0]["recordedAt"]
    wait_until(lambda: datetime.now(UTC) > datetime.fromisoformat(earlier) + timedelta(milliseconds=2))
    between = datetime.fromisoformat(earlier) + timedelta(milliseconds=1)
    source.commit(record("orders", 2))
    assert ids(poll(client, since=earlier)) == [1, 2]
    assert ids(poll(client, since=between.isoformat())) == [2]
    assert ids(poll(client, since=between.astimezone(timezone(timedelta(hours=5))).isoformat())) == [2]
    assert ids(poll(client, since=between.replace(tzinfo=None).isoformat())) == [2]
    assert ids(poll(client, since="9999-12-31T23:59:59-14:00")) == []
    assert ids(poll(client, since="0001-01-01T00:00:00+14:00")) == [1, 2]


def test_since_now_and_since_the_beginning(client: httpx.Client, source: Source) -> None:
    assert poll(client, since="now")["cursor"] == "0"
    source.commit(record("orders"), record("orders"))
    now = poll(client, since="now")
    assert (now["changes"], now["cursor"], now["hasMore"]) == ([], "2", False)
    assert ids(poll(client)) == ids(poll(client, since="0")) == [1, 2]


def test_a_long_poll_answers_when_there_is_something(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(poll, client, since="1", channels="orders", wait=60)
        source.commit(record("clients"))
        source.commit(record("orders"))
        assert ids(waiting.result(30)) == [3]


def test_a_long_poll_ends_with_its_time(client: httpx.Client, source: Source) -> None:
    source.commit(record("clients"))
    answer = poll(client, since="0", channels="orders", wait=0.05)
    assert (answer["changes"], answer["cursor"], answer["hasMore"]) == ([], "1", False)


def test_a_long_poll_ends_with_its_client(gateway: Gateway, source: Source) -> None:
    source.commit(record("clients"))
    waiting = threading.Event()
    news, waits = gateway.feed.news, []

    async def watched(after: int, timeout_seconds: float, ends: int) -> bool:
        waits.append(after)
        waiting.set()
        try:
            return await news(after, timeout_seconds, ends)
        finally:
            waits.pop()

    gateway.feed.news = watched  # type: ignore[method-assign]
    with socket.create_connection(gateway.address) as connection:
        request = f"GET {POLL}?since=now&wait=60 HTTP/1.1\r\nHost: x\r\nAuthorization: {ADMIN['Authorization']}\r\n\r\n"
        connection.sendall(request.encode())
        assert waiting.wait(30)
    wait_until(lambda: not waits)


def test_a_long_poll_does_not_spin_over_what_was_pruned(gateway: Gateway, client: httpx.Client, source: Source) -> None:
    """What it may see ends before the feed does, since all behind it was of other types, and is gone."""
    source.commit(record("orders"), record("clients"), record("clients"))
    assert client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0, "entityType": "Clients"}).json() == {"removed": 2}
    wait_until(lambda: gateway.feed.ring.head == 3)
    calls = 0
    call = gateway.feed.call

    async def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return await call(*args)

    gateway.feed.call = counted  # type: ignore[method-assign, assignment]
    assert poll(client, since="1", entityTypes="Orders", wait=0.2)["changes"] == []
    assert calls == 1


def test_pollers_miss_nothing_while_it_is_written(client: httpx.Client, source: Source) -> None:
    total = 300

    def write() -> None:
        for number in range(total):
            source.commit(record("orders" if number % 3 else "clients", number))

    def read() -> list[int]:
        found: list[int] = []
        cursor = "0"
        while len(found) < total * 2 // 3:
            answer = poll(client, since=cursor, channels="orders", wait=30, limit=7)
            found += ids(answer)
            cursor = answer["cursor"]
        return found

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(3)]
        pool.submit(write).result(60)
        expected = [number + 1 for number in range(total) if number % 3]
        assert [reader.result(60) for reader in readers] == [expected] * 3


# --- gaps -------------------------------------------------------------------------------------------------------------


def gap(client: httpx.Client, **query: Any) -> Any:
    answer = client.get(POLL, params=query)
    assert answer.status_code == 410, answer.text
    assert answer.json()["error"]
    assert answer.json()["hint"]
    return answer.json()


def test_f104_a_cursor_behind_which_something_was_removed_is_a_gap(client: httpx.Client, source: Source) -> None:
    source.commit(*(record("orders", number) for number in range(5)))
    cutoff = time.time_ns() // 1_000
    wait_until(lambda: time.time_ns() // 1_000 > cutoff)
    assert client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0}).json() == {"removed": 5}
    source.commit(record("orders", 5), record("orders", 6))
    found = gap(client, since="3")
    assert (found["oldest"], found["cursor"]) == ("6", "5")
    assert ids(poll(client, since=found["cursor"])) == [6, 7]
    assert ids(poll(client)) == [6, 7], "who asks for whatever is kept misses nothing"
    assert gap(client, since="2020-01-01")["cursor"] == "5"
    assert gap(client, since="4", wait=30)["cursor"] == "5"


def test_f104_a_first_poll_goes_on_behind_removed_changes_of_another_type(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"), record("clients"), record("clients"))
    client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0, "entityType": "Clients"})
    first = poll(client)
    assert (ids(first), first["cursor"]) == ([1], "3")
    assert poll(client, since=first["cursor"])["changes"] == []


def test_f104_only_the_wanted_types_count(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"), record("clients"), record("orders"))
    client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0, "entityType": "Clients"})
    assert ids(poll(client, since="0", entityTypes="Orders")) == [1, 3]
    assert ids(poll(client, since="2020-01-01", entityTypes="Orders")) == [1, 3]
    assert ids(poll(client, since="2")) == [3]
    assert gap(client, since="1")["cursor"] == "2"
    assert gap(client, since="1", entityTypes="Orders,Clients")["cursor"] == "2"
    assert gap(client, since="1", channels="clients")["cursor"] == "2"
    assert ids(poll(client, since="1", channels="orders")) == [3]


def test_f104_where_all_was_removed_nobody_who_begins_has_a_gap(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"), record("clients"))
    client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0})
    found = poll(client)
    assert (found["changes"], found["cursor"]) == ([], "2")
    assert poll(client, since=found["cursor"])["changes"] == []
    assert poll(client, entityTypes="Orders")["cursor"] == "2"
    source.commit(record("orders"))
    assert ids(poll(client, since=found["cursor"])) == [3]


def test_f104_what_is_left_in_a_gap_can_be_read(client: httpx.Client, source: Source) -> None:
    """Types are kept for different times: what is left of others has smaller ids than what was removed."""
    source.commit(*(record(channel) for channel in ("orders", "clients") * 3))
    client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0, "entityType": "Clients"})
    assert gap(client, since="1")["resume"] == "1~6"
    for since in ({}, {"since": "0~6"}):
        seen, page = [], poll(client, limit=1, **since)
        while page["changes"]:
            seen += ids(page)
            page = poll(client, limit=1, since=page["cursor"])
        assert seen == [1, 3, 5]
    assert page["cursor"] == "5~6"
    source.commit(record("clients"))
    client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0, "entityType": "Clients"})
    assert gap(client, since="1~6")["cursor"] == "7", "that was not known to be missing"


def test_f104_a_cursor_of_another_feed_is_a_gap(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"), record("orders"))
    for beyond in ("3", str(2**63 - 1), "9" * 19):
        found = gap(client, since=beyond)
        assert (found["oldest"], found["cursor"]) == ("1", "0")
    assert ids(poll(client, since="0")) == [1, 2]


def test_f104_a_feed_that_was_lost_leaves_its_cursors_behind(client: httpx.Client, place: Place) -> None:
    """Whatever the next one under that name has by then: what was told in between is missing."""
    seen: list[int] = []
    for _ in range(3):
        for file in place.directory.glob("data_changes.sqlite*"):
            file.unlink()
        source = Source(writer(place, "shop"))
        source.commit(*(record("orders") for _ in range(20)))
        source.close()
        for cursor in seen:
            found = gap(client, since=str(cursor))
            assert ids(poll(client, since=found["cursor"])) == ids(poll(client, since=found["resume"])) == new(client)
        assert ids(poll(client)) == new(client), "who holds nothing of another feed misses nothing"
        assert not set(seen) & set(new(client))
        assert max(new(client)) < 2**53, "a number in every language"
        seen += new(client)


def new(client: httpx.Client) -> list[int]:
    """All ids of a feed, for who begins to read it."""
    return ids(poll(client, since="0"))


def test_f104_what_is_removed_while_one_waits_is_a_gap(gateway: Gateway, client: httpx.Client, source: Source) -> None:
    """The gap is looked for after the feed: so one that opens in between is seen."""
    source.commit(record("orders"), record("orders"))
    scan = gateway.feed.reader.scan

    def late(*args: Any) -> Any:
        gateway.feed.publisher.prune(None, time.time_ns() // 1_000 + 1, 10)
        return scan(*args)

    gateway.feed.reader.scan = late  # type: ignore[method-assign, assignment]
    assert gap(client, since="0")["cursor"] == "2"


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def companies(source: Source) -> Source:
    def change(number: int, before: str | None, after: str | None) -> Any:
        sides = {"before": before, "after": after}
        images: dict[str, Any] = {
            name: None if side is None else f'{{"company_id": "{side}"}}'.encode() for name, side in sides.items()
        }
        kind = ChangeType.CREATE if before is None else ChangeType.DELETE if after is None else ChangeType.UPDATE
        scopes: dict[str, Any] = {f"scope_{name}": image for name, image in images.items()}
        return record("orders", number, change_type=kind, **images, **scopes)

    source.commit(
        change(1, None, "7"), change(2, None, "8"), change(1, "7", "8"), change(2, "8", "7"), change(1, "8", None)
    )
    return source


def expected_by_ours() -> list[tuple[int, str, Any, Any]]:
    ours = {"company_id": "7"}
    return [(1, "CREATE", None, ours), (3, "DELETE", ours, None), (4, "CREATE", None, ours)]


def shown(changes: Sequence[Any]) -> list[tuple[int, str, Any, Any]]:
    return [(change["id"], change["changeType"], change["before"], change["after"]) for change in changes]


def test_f105_rows_of_others_are_not_seen(client: httpx.Client, companies: Source) -> None:
    client.headers.update(bearer("ours"))
    assert shown(follow(client, limit=2)) == expected_by_ours()
    histories = [client.get(f"/api/changes/Orders/{number}").json()["changes"] for number in (1, 2)]
    assert sorted(shown([*histories[0], *histories[1]])) == expected_by_ours()
    assert not client.get("/status").is_success


def test_f105_rows_of_others_are_not_streamed_either(gateway: Gateway, companies: Source) -> None:
    with event_stream(gateway.url, "?since=0", bearer("ours")) as stream:
        assert [next(stream)["event"] for _ in range(3)] == ["created", "deleted", "created"]


def test_f105_channels_of_others_are_not_seen(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders", 1), record("clients", 1), record("orders", 2))
    client.headers.update(bearer("orders"))
    assert ids(poll(client)) == [1, 3]
    assert ids(poll(client, entityTypes="Clients")) == []
    assert client.get("/api/changes/Clients/1").json() == {"changes": [], "cursor": None, "hasMore": False}
    refusal = client.get(POLL, params={"channels": "orders,clients"})
    assert (refusal.status_code, refusal.json()["error"]) == (403, "channels: the token does not allow all of them")


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_is_one_entity_newest_first(client: httpx.Client, source: Source) -> None:
    source.commit(*(record("orders", number % 2, number) for number in range(10)))
    answer = client.get("/api/changes/Orders/1", params={"limit": 3}).json()
    assert ([change["version"] for change in answer["changes"]], answer["hasMore"]) == ([9, 7, 5], True)
    rest = client.get("/api/changes/Orders/1", params={"limit": 3, "before": answer["cursor"]}).json()
    assert ([change["version"] for change in rest["changes"]], rest["hasMore"]) == ([3, 1], False)
    assert client.get("/api/changes/Orders/nothing").json() == {"changes": [], "cursor": None, "hasMore": False}


@pytest.mark.parametrize("entity_id", ["a/b", "../x", "ä ö", "50%", "a?b#c", "*", "a%2Fb"])
def test_history_of_any_id(client: httpx.Client, source: Source, entity_id: str) -> None:
    source.commit(record("orders", entity_id, after=b"{}"))
    path = "".join(f"%{byte:02X}" for byte in entity_id.encode())
    (change,) = client.get(f"/api/changes/Orders/{path}").json()["changes"]
    assert change["entityId"] == entity_id


# --- publishing -------------------------------------------------------------------------------------------------------


def publish(client: httpx.Client, key: str = "", **event: Any) -> httpx.Response:
    given = {"channel": "clients", "event": "created", "id": "7", **event}
    return client.post("/publish", json=given, headers={"Idempotency-Key": key} if key else {})


def test_a_published_event_is_a_change_like_any_other(gateway: Gateway, client: httpx.Client) -> None:
    with httpx.Client(base_url=gateway.url, headers=ADMIN) as other, event_stream(gateway.url, headers=ADMIN) as stream:
        first = publish(client, data={"name": "Ann"}, locationId="north", userId="u5")
        assert (first.status_code, first.json()) == (201, {"cursor": "1", "version": 1})
        assert publish(client, event="updated", data={"name": "Bob"}).json() == {"cursor": "2", "version": 2}
        assert publish(client, event="deleted", data={"name": "Bob"}).json()["version"] == 3
        assert publish(client, event="greeted", entityType="Client").json()["version"] == 1
        assert [next(stream)["event"] for _ in range(4)] == ["created", "updated", "deleted", "greeted"]
        changes = poll(other)["changes"]
    assert [change["changeType"] for change in changes] == ["CREATE", "UPDATE", "DELETE", "EVENT"]
    assert [change["entityType"] for change in changes] == ["clients", "clients", "clients", "Client"]
    assert {change["source"] for change in changes} == {"@publish"}
    assert (changes[0]["locationId"], changes[0]["userId"]) == ("north", "u5")
    assert (changes[2]["before"], changes[2]["after"]) == ({"name": "Bob"}, None)
    assert [change.get("event") for change in changes] == [None, None, None, "greeted"]


def test_an_event_with_a_key_is_stored_once(gateway: Gateway, client: httpx.Client) -> None:
    assert publish(client, "k1").status_code == 201
    again = publish(client, "k1")
    assert (again.status_code, again.json()) == (200, {"duplicate": True})
    assert publish(client, "k2").status_code == 201
    with httpx.Client(base_url=gateway.url, headers=bearer("tills")) as other:
        assert publish(other, "k1", channel="tills").status_code == 201, "keys are everybody's own"
    changes = poll(client)["changes"]
    assert len(changes) == 3
    assert not [change for change in changes if "k1" in change["position"]]


def test_published_numbers_stay_what_they_are(client: httpx.Client) -> None:
    body = '{"channel": "a", "event": "created", "id": "1", "data": {"price": 12.50, "big": 123456789012345678901234}}'
    assert client.post("/publish", content=body).status_code == 201
    assert '{"price": 12.50, "big": 123456789012345678901234}' in client.get(POLL).text


def test_f105_a_limited_token_publishes_within_its_limits(client: httpx.Client) -> None:
    client.headers.update(bearer("tills"))
    assert publish(client, channel="tills").status_code == 201
    assert publish(client, channel="orders").status_code == 403
    client.headers.update(bearer("orders"))
    assert publish(client, channel="orders").status_code == 403


def test_a_published_update_stays_an_update_for_limited_tokens(gateway: Gateway, client: httpx.Client) -> None:
    ours = {"company_id": 7}
    for event in ("created", "updated", "greeted", "deleted"):
        publish(client, event=event, data=ours)
        publish(client, event=event, data={"company_id": 8})
    client.headers.update(bearer("ours"))
    assert [change["changeType"] for change in follow(client)] == ["CREATE", "UPDATE", "EVENT", "DELETE"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("since=yesterday", "since"), ("since=-1", "since"), ("since=", "since"), ("since=1.5", "since"),
        ("since=2026-02-31", "since"), ("since=%D9%A3", "since"), ("since=1&since=2", "since"),
        ("since=" + "9" * 60_000, "since"), ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=ten", "limit"),
        ("limit=", "limit"), ("wait=61", "wait"), ("wait=-1", "wait"), ("wait=nan", "wait"), ("wait=inf", "wait"),
        ("entityTypes=", "entityTypes"), ("entityTypes=Order,,Client", "entityTypes"), ("channels=%00", "channels"),
        ("channels=" + ",".join("x" * 101), "channels"), ("entityTypes=" + "x" * 201, "entityTypes"),
        ("locationId=%00", "locationId"), ("locationId=a%0A", "locationId"), ("entityType=Order", "entityType"),
    ],
)  # fmt: skip
def test_f107_bad_queries_are_named(standing: httpx.Client, query: str, named: str) -> None:
    answer = standing.get(f"{POLL}?{query}")
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert len(answer.text) < 1_000


@pytest.mark.parametrize(
    ("method", "path", "body", "error", "hint"),
    [
        ("GET", f"{POLL}?sinse=1", None, "a parameter: Object contains unknown field `sinse`", "since, limit, wait"),
        ("GET", f"{POLL}?entityTypes=a,,b", None, "entityTypes[1]: empty", "No control characters"),
        ("GET", f"{POLL}?since=", None, "since: empty", "A cursor; a time, which means `recordedAt`; or `now`"),
        ("GET", "/api/changes/stream?since=", None, "since: not of the expected form", "A cursor"),
        ("GET", f"{POLL}?entityTypes=a%01", None, "entityTypes[0]: not of the expected form", "No control characters"),
        ("POST", "/publish", {"channel": "*", "event": "e", "id": "1"}, "channel: not of the", "no `*`"),
        ("POST", "/publish", {"channel": "x", "event": "gap", "id": "1"}, "event: not of the", "gap, error, open"),
        ("POST", "/publish", {"channel": "x", "event": "e"}, "the body: Object missing required field `id`", "channel"),
        ("POST", "/publish", {"channel": "x", "event": "e", "id": 7}, "id: Expected `str`, got `int`", "A string"),
    ],
)
def test_f107_errors_say_what_is_expected(
    standing: httpx.Client, method: str, path: str, body: Any, error: str, hint: str
) -> None:
    answer = standing.request(method, path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(error)
    assert "regex" not in answer.json()["error"]
    assert hint in answer.json()["hint"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/changes/Orders/1?limit=0",
        "/api/changes/Orders/1?before=x",
        "/api/changes/Orders/%00",
        "/api/changes/Orders/",
    ],
)
def test_f107_bad_histories(standing: httpx.Client, path: str) -> None:
    assert standing.get(path).status_code == 400


@pytest.mark.parametrize(
    "event",
    [
        {"channel": 1}, {"channel": ""}, {"channel": "a,b"}, {"channel": "*"}, {"channel": "a\n"},
        {"event": "cursor"}, {"event": "gap"}, {"event": "error"}, {"event": "a\nb"}, {"event": "a\n"}, {"event": ""},
        {"id": None}, {"id": ""}, {"id": "\0"}, {"id": "ü" * 751}, {"data": []}, {"data": "x"}, {"data": None},
        {"userId": "\0"}, {"x": 1},
    ],
)  # fmt: skip
def test_f107_bad_events(standing: httpx.Client, event: dict[str, Any]) -> None:
    answer = standing.post("/publish", json={"channel": "a", "event": "created", "id": "1", **event})
    assert answer.status_code == 400
    assert next(iter(event)) in answer.json()["error"]


@pytest.mark.parametrize("missing", ["channel", "event", "id"])
def test_f107_incomplete_events(standing: httpx.Client, missing: str) -> None:
    event = {"channel": "a", "event": "created", "id": "1"}
    del event[missing]
    answer = standing.post("/publish", json=event)
    assert (answer.status_code, missing in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"channel": "\xff"}', b"[" * 60_000, b'{"a": ' * 9_000, b"1e999", b'"\\ud800"',
     b'{"channel": "a", "event": "created", "id": "1", "data": {"x": "\xff"}}',
     b'{"channel": "a", "event": "created", "id": "1", "data": {"x": "\\ud800"}}'],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/publish", f"{POLL}/cleanup"])
def test_f107_bodies_that_are_no_json(standing: httpx.Client, path: str, body: bytes) -> None:
    answer = standing.post(path, content=body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "hint"}


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256])
def test_f107_bad_keys(standing: httpx.Client, key: str) -> None:
    event = {"channel": "a", "event": "created", "id": "1"}
    answer = standing.post("/publish", json=event, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert (answer.status_code, "Idempotency-Key" in answer.json()["error"]) == (400, True)


def test_f107_a_large_body_is_refused_without_being_kept(standing: httpx.Client) -> None:
    event = {"channel": "a", "event": "created", "id": "1", "data": {"x": "y" * MAX_BODY_BYTES}}
    assert standing.post("/publish", json=event).status_code == 413


@pytest.mark.parametrize("body", [{"hoursToKeep": -1}, {"hoursToKeep": "1"}, {}, {"hoursToKeep": 1, "entityType": ""}])
def test_f107_bad_cleanups(standing: httpx.Client, body: dict[str, Any]) -> None:
    assert standing.post(f"{POLL}/cleanup", json=body).status_code == 400


# --- cleaning up ------------------------------------------------------------------------------------------------------


def test_cleanup_removes_what_is_older(client: httpx.Client, source: Source) -> None:
    source.commit(record("orders"), record("clients"))
    assert client.post(f"{POLL}/cleanup", json={"hoursToKeep": 1}).json() == {"removed": 0}
    assert client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0, "entityType": "Orders"}).json() == {"removed": 1}
    assert ids(poll(client)) == [2]
    assert client.post(f"{POLL}/cleanup", json={"hoursToKeep": 0}).json() == {"removed": 1}


def test_the_store_being_away_is_a_503(gateway: Gateway, client: httpx.Client, place: Place, source: Source) -> None:
    source.commit(record("orders"))
    assert ids(poll(client)) == [1]
    source.close()
    place.file.rename(place.file.with_suffix(".away"))

    def asked() -> httpx.Response:
        gateway.feed.reader.close()  # an open connection would go on reading the file, whatever its name
        return client.get(POLL)

    wait_until(lambda: asked().status_code != 200)
    answer = asked()
    assert (answer.status_code, set(answer.json())) == (503, {"error", "hint"})


def test_f105_a_browser_streams_with_a_ticket(gateway: Gateway, client: httpx.Client, source: Source) -> None:
    """Over the wire: WebSocket and event stream, each with a ticket that then is used up."""
    client.headers.update(bearer("orders"))
    ticket = client.post("/api/tickets").json()["ticket"]
    with event_stream(gateway.url, f"?ticket={ticket}") as stream:
        source.commit(record("clients"), record("orders"))
        assert next(stream)["id"] == "2"
    assert (
        client.get("/api/changes/stream", params={"ticket": ticket}, headers={"Authorization": ""}).status_code == 401
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("", 401),
        ("Authorization: Bearer wrong\r\n", 401),
        ("Authorization: Bearer tills-token\r\n", 403),
        ("Authorization: Bearer orders-token\r\nOrigin: https://evil.example\r\n", 403),
        ("Authorization: Bearer orders-token\r\n", 101),
    ],
)
def test_f105_over_the_wire_nobody_is_upgraded_before_authentication(
    standing: httpx.Client, headers: str, status: int
) -> None:
    handshake = (
        f"GET /ws HTTP/1.1\r\nHost: cdc.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{headers}"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with socket.create_connection((standing.base_url.host, standing.base_url.port or 80), timeout=30) as connection:
        connection.sendall(handshake.encode())
        assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())
