"""Failures on demand: fail points as real servers have them, and the stand-in's own commands."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pymongo
import pytest
from pymongo.errors import AutoReconnect, NotPrimaryError, OperationFailure

from tests.mongod.fixture import NewStandIn
from tests.mongod.process import ROOT, StandIn
from tests.processes import ended, wait_until

Json = dict[str, Any]
Client = pymongo.MongoClient[Json]


@contextmanager
def failing(client: Client, mode: Any, *, name: str = "failCommand", **data: Any) -> Iterator[None]:
    client.admin.command("configureFailPoint", name, mode=mode, data=data)
    try:
        yield
    finally:
        client.admin.command("configureFailPoint", name, mode="off")


def test_error_codes_and_labels(stand_in_client: Client) -> None:
    database = stand_in_client["failures"]
    with failing(stand_in_client, {"times": 1}, failCommands=["find"], errorCode=2, errorLabels=["Ours"]):
        with pytest.raises(OperationFailure) as failure:
            database["c"].find_one()
        assert failure.value.code == 2
        assert failure.value.has_error_label("Ours")
        database["c"].find_one()
    with failing(stand_in_client, {"skip": 1}, failCommands=["find"], errorCode=2):
        database["c"].find_one()
        with pytest.raises(OperationFailure):
            database["c"].find_one()
    with failing(stand_in_client, {"activationProbability": 0.0}, failCommands=["find"], errorCode=2):
        database["c"].find_one()
    with failing(stand_in_client, "alwaysOn", failCommands=["find"], errorCode=2, appName="somebody else"):
        database["c"].find_one()


def test_closed_connections_are_retried_by_the_driver(stand_in_client: Client) -> None:
    collection = stand_in_client["failures"]["retried"]
    for option in ("closeConnection", "closeConnectionAfter"):
        data: Json = {option: True}
        with failing(stand_in_client, {"times": 1}, failCommands=["insert"], **data):
            collection.insert_one({"by": option})
        assert collection.count_documents({"by": option}) == 1
    with (
        failing(stand_in_client, {"times": 2}, failCommands=["insert"], closeConnection=True),
        pytest.raises(AutoReconnect),
    ):
        collection.insert_one({})
    with failing(stand_in_client, {"times": 1}, failCommands=["insert"], errorCode=189):
        collection.insert_one({})  # labelled RetryableWriteError by the server


def test_write_concern_errors(stand_in_client: Client) -> None:
    error = {"code": 64, "errmsg": "waiting for replication timed out"}
    with (
        failing(stand_in_client, {"times": 1}, failCommands=["insert"], writeConcernError=error),
        pytest.raises(OperationFailure) as failure,
    ):
        stand_in_client["failures"]["c"].insert_one({"_id": "concern"})
    assert failure.value.code == 64
    assert stand_in_client["failures"]["c"].count_documents({"_id": "concern"}) == 1


def test_blocked_commands(stand_in_client: Client) -> None:
    with (
        failing(stand_in_client, {"times": 1}, failCommands=["ping"], blockConnection=True, blockTimeMS=50),
        pymongo.timeout(0.02),
        pytest.raises(pymongo.errors.PyMongoError),
    ):
        stand_in_client.admin.command("ping")


@pytest.mark.parametrize("name", ["failCommand", "failGetMoreAfterCursorCheckout"])
def test_change_streams_resume(stand_in_client: Client, name: str) -> None:
    """Labels: by the server after the cursor was found, by the fail point itself before that."""
    data: Json = {"errorCode": 91}
    if name == "failCommand":
        data |= {"failCommands": ["getMore"], "errorLabels": ["ResumableChangeStreamError"]}
    database = stand_in_client[f"resume_{name}"]
    with database.watch() as stream:
        database["c"].insert_one({"_id": 1})
        assert stream.next()["documentKey"] == {"_id": 1}
        with failing(stand_in_client, {"times": 1}, name=name, **data):
            database["c"].insert_one({"_id": 2})
            assert stream.next()["documentKey"] == {"_id": 2}
        with failing(stand_in_client, {"times": 1}, failCommands=["getMore"], errorCode=280):
            with pytest.raises(OperationFailure) as fatal:
                stream.next()
            assert fatal.value.has_error_label("NonResumableChangeStreamError")


def test_killed_cursors_and_lost_positions(new_stand_in: NewStandIn) -> None:
    server = new_stand_in("--oplog-size", "5")
    with Client(server.url) as client:
        with client["d"].watch(batch_size=1) as stream:
            client["d"]["c"].insert_one({"_id": 1})
            token = stream.next()["_id"]
            client["d"]["c"].insert_many([{} for _ in range(9)])
            with pytest.raises(OperationFailure) as lost:
                stream.next()
        assert lost.value.code == 136
        with pytest.raises(OperationFailure) as gone, client["d"].watch(resume_after=token):
            pass
        assert gone.value.code == 286
        assert server.command("cdcTestStatistics")["oplogEntries"] == 5


def test_a_majority_that_does_not_advance(new_stand_in: NewStandIn) -> None:
    server = new_stand_in()
    with Client(server.url) as client, client["d"].watch(max_await_time_ms=20) as stream:
        server.command("cdcTestHoldMajority", True)
        client["d"]["c"].insert_one({"_id": 1})
        assert stream.try_next() is None
        last = client.admin.command("hello")["lastWrite"]
        assert last["majorityOpTime"]["ts"] < last["opTime"]["ts"]
        server.command("cdcTestHoldMajority", False)
        assert stream.next()["documentKey"] == {"_id": 1}


def test_blackout(new_stand_in: NewStandIn) -> None:
    server = new_stand_in()
    with Client(server.url) as client:
        client["d"]["c"].insert_one({"_id": 1})
        server.command("cdcTestBlackout", 0.4)
        wait_until(lambda: _refused(server.port), what="the blackout")
        assert client["d"]["c"].find_one() == {"_id": 1}  # once it is back, on the same port


def _refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_step_down(new_stand_in: NewStandIn) -> None:
    server = new_stand_in()
    with Client(server.url, retryWrites=False, heartbeatFrequencyMS=500) as client, client["d"].watch() as stream:
        client["d"]["c"].insert_one({"_id": 1})
        stream.next()
        server.command("replSetStepDown", 0.3)
        direct = f"mongodb://127.0.0.1:{server.port}/?directConnection=true&retryWrites=false"
        with Client(direct) as other:
            assert not other.admin.command("hello")["isWritablePrimary"]
            with pytest.raises(NotPrimaryError) as refused:
                other["d"]["c"].insert_one({})
            assert dict(refused.value.details)["code"] == 10107
        client["d"]["c"].insert_one({"_id": 2})  # the driver waits for the new primary
        assert stream.next()["documentKey"] == {"_id": 2}


def test_the_process_ends_with_its_parent() -> None:
    code = "import subprocess, sys; from tests.mongod.process import StandIn; print(StandIn().pid, flush=True)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    pid = int(found.stdout)
    wait_until(lambda: not psutil.pid_exists(pid) or ended(psutil.Process(pid)), what="the stand-in to end")


def test_garbage_closes_only_its_connection(stand_in: StandIn, stand_in_client: Client) -> None:
    for garbage in (
        b"GET / HTTP/1.0\r\n\r\n",
        struct.pack("<iiiiI", 20, 1, 0, 2013, 0),
        struct.pack("<iiii", 16, 1, 0, 1),
    ):
        with socket.create_connection(("127.0.0.1", stand_in.port), timeout=60) as client:
            client.sendall(garbage)
            assert client.recv(100) == b""
    stand_in_client.admin.command("ping")


def test_legacy_hello(stand_in: StandIn) -> None:
    body = b"\x10isMaster\0\1\0\0\0"
    document = struct.pack("<i", len(body) + 5) + body + b"\0"
    query = struct.pack("<i", 0) + b"admin.$cmd\0" + struct.pack("<ii", 0, -1) + document
    with socket.create_connection(("127.0.0.1", stand_in.port), timeout=60) as client:
        client.sendall(struct.pack("<iiii", 16 + len(query), 7, 0, 2004) + query)
        size, _, response_to, opcode = struct.unpack("<iiii", client.recv(16))
        assert (response_to, opcode) == (7, 1)
        assert b"setName" in client.recv(size)
