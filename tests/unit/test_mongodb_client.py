"""PyMongo's errors sorted by what to do about them, and clients that no URL makes careless."""

from __future__ import annotations

import time
from typing import Any

import pytest
from bson.errors import InvalidBSON
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    CursorNotFound,
    DuplicateKeyError,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    ProtocolError,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
    WriteError,
    WTimeoutError,
)

from cdc.errors import CdcError, DecodeError, FatalError, PermanentError, ResyncRequired, TransientError
from cdc.mongodb.client import clean, connect, server_error, to_cdc_error, translated_errors
from cdc.mongodb.deployment import is_full, majority_delay, read_deployment
from cdc.mongodb.fingerprint import Fingerprint, check, encode
from cdc.mongodb.url import database_name, one_host
from cdc.pulse import Pulse


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AutoReconnect("connection closed"), TransientError),
        (AutoReconnect("h:1: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)"), FatalError),
        (AutoReconnect("h:1: [SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (_ssl.c:2580)"), FatalError),
        (AutoReconnect("h:1: [SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] alert (_ssl.c:2580)"), FatalError),
        (AutoReconnect("h:1: [SSL: TLSV1_ALERT_INTERNAL_ERROR] alert (_ssl.c:2580)"), TransientError),
        (NotPrimaryError("not primary", {"code": 10107}), TransientError),
        (NetworkTimeout("timed out"), TransientError),
        (ServerSelectionTimeoutError("h:1: refused, Timeout: 1s, Topology Description: <...>"), TransientError),
        (WaitQueueTimeoutError("no connection"), TransientError),
        (ProtocolError("Got response id -1 but expected 5"), TransientError),
        (WTimeoutError("waiting for replication timed out", 64), TransientError),
        (CursorNotFound("cursor id 5 not found", 43), TransientError),
        (OperationFailure("x", 999, {"errorLabels": ["TransientTransactionError"]}), TransientError),
        (OperationFailure("x", 112), TransientError),
        (OperationFailure("x", 18), FatalError),
        (OperationFailure("x", 13), FatalError),
        (OperationFailure("x", 999), FatalError),
        (DuplicateKeyError("E11000 dup key: { a: 'geheim' }", 11000), PermanentError),
        (WriteError("x", 999), PermanentError),
        (BulkWriteError({"writeErrors": [{"code": 121, "errmsg": "x"}], "writeConcernErrors": []}), PermanentError),
        (BulkWriteError({"writeErrors": [], "writeConcernErrors": [{"code": 91, "errmsg": "x"}]}), TransientError),
        (InvalidBSON("bad"), DecodeError),
        (PyMongoError("x"), FatalError),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'code', '')}" if isinstance(value, Exception) else "",
)
def test_errors_by_what_to_do(error: Any, kind: type[CdcError]) -> None:
    translated = to_cdc_error(error)
    assert type(translated) is kind
    assert "geheim" not in str(translated)
    assert "Topology" not in str(translated)


@pytest.mark.parametrize("code", [286, 260, 280, 136, 40576, 40585, 40615, 222, 9, 15, 40647, 47])
def test_f59_codes_that_end_a_stream_for_good(code: int) -> None:
    error = to_cdc_error(OperationFailure("x", code), streaming=True)
    assert isinstance(error, ResyncRequired)
    assert error.hint


@pytest.mark.parametrize(
    ("code", "hint"), [(10334, "6.0.9"), (18, "authSource"), (13, "grant"), (40573, "--replSet rs0")]
)
def test_hints_say_what_to_do(code: int, hint: str) -> None:
    error = to_cdc_error(OperationFailure("x", code), streaming=True)
    assert type(error) is FatalError
    assert hint in error.hint


def test_what_a_code_means_elsewhere() -> None:
    assert type(server_error(9, "x")) is FatalError
    assert type(server_error(10334, "x", write=True)) is PermanentError
    assert type(server_error(None, "x", labels=("RetryableWriteError",))) is TransientError


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("E11000 duplicate key error index: c dup key: { c: 5 }", "E11000 duplicate key error index: c"),
        ("Cannot create field 'b' in element {a: 5}", "Cannot create field 'b'"),
        ("BSONObj size: 5 is invalid. First element: _id: 7", "BSONObj size: 5 is invalid."),
        ("two\n lines", "two lines"),
        ("{", "no reason given"),
    ],
)  # fmt: skip
def test_f113_messages_quote_no_document(message: str, cleaned: str) -> None:
    assert clean(message) == cleaned


def test_no_url_makes_a_client_careless() -> None:
    url = "mongodb://h/shop?w=1&journal=false&readPreference=secondary&readConcernLevel=local&connectTimeoutMS=77"
    with connect(url, connect=False) as client:
        assert client.write_concern.document == {"w": "majority", "j": True}
        assert client.read_concern.level == "majority"
        assert client.read_preference.name == "Primary"
        assert client.options.pool_options.connect_timeout == 0.077
        assert client.options.server_selection_timeout == 10


@pytest.mark.parametrize(
    ("url", "alone"),
    [
        (
            "mongodb://me:p%40ss@a:1,b:2/shop?replicaSet=rs0&tls=true",
            "mongodb://me:p%40ss@c:3/shop?tls=true&directConnection=true",
        ),
        ("mongodb://a", "mongodb://c:3/?directConnection=true"),
    ],
)
def test_one_router_of_several(url: str, alone: str) -> None:
    assert one_host(url, ("c", 3)) == alone
    assert database_name(alone) in {"shop", None}


def test_ipv6_router() -> None:
    assert one_host("mongodb://a/", ("::1", 3)) == "mongodb://[::1]:3/?directConnection=true"


@pytest.mark.parametrize(
    ("version", "images", "split"),
    [((5, 0, 9), False, False), ((6, 0, 8), True, False), ((6, 0, 9), True, True), ((8, 0, 0), True, True)],
)
def test_servers_by_version(version: tuple[int, ...], *, images: bool, split: bool) -> None:
    deployment = read_deployment({"setName": "rs0", "maxWireVersion": 13}, {"versionArray": [*version, 0]}, None)
    assert (deployment.has_images, deployment.can_split_events) == (images, split)
    assert not deployment.sharded
    assert read_deployment({"msg": "isdbgrid"}, {"versionArray": [7, 0, 0]}, None).sharded


def test_servers_that_have_no_change_streams() -> None:
    with pytest.raises(FatalError, match="standalone"):
        read_deployment({}, {"versionArray": [7, 0, 0]}, None)
    with pytest.raises(FatalError, match="too old"):
        read_deployment({"setName": "rs0"}, {"versionArray": [4, 0, 0]}, None)


def test_f81_majority_that_lags() -> None:
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415

    now = datetime.now(UTC)
    written = {"lastWriteDate": now, "majorityWriteDate": now - timedelta(seconds=30)}
    assert majority_delay({"lastWrite": written}) == 30
    assert majority_delay({"lastWrite": {**written, "majorityWriteDate": now}}) == 0
    assert majority_delay({}) == 0


def test_f61_identity_is_compared_as_far_as_both_sides_know_it() -> None:
    def of(**identity: str) -> Fingerprint:
        return Fingerprint(identity, ("*",), (), "off", "off", expanded_events=False, split_events=False)

    check(encode(of(name="rs0")), of(name="rs0", id="5"))
    check(None, of())
    with pytest.raises(ResyncRequired, match="id of the deployment was '4' and is '5'"):
        check(encode(of(name="rs0", id="4")), of(name="rs0", id="5"))


def test_f61_more_is_no_other_stream() -> None:
    """A server that was upgraded can do more; what the configuration asks for may not change."""
    old = Fingerprint({}, ("a.*",), ("a.x",), "off", "off", expanded_events=False, split_events=False)
    new = Fingerprint({}, ("a.*", "b.*"), (), "off", "off", expanded_events=True, split_events=True)
    check(encode(old), new)
    with pytest.raises(ResyncRequired) as caught:
        check(encode(new), old)
    for word in ("narrower", "show_expanded_events", "split_large_events"):
        assert word in str(caught.value)


def test_oplog_is_full_shortly_before_it_is() -> None:
    assert is_full({"size": 95, "maxSize": 100})
    assert not is_full({"size": 50, "maxSize": 100})
    assert is_full({"size": 50})


def test_whoever_waits_for_a_server_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = Pulse()
    with pulse.felt(), translated_errors():
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
        assert pulse.silent_seconds == 0
