"""What status computes from what capture and delivery count."""

from __future__ import annotations

import time

import pytest
from prometheus_client import generate_latest
from rich.console import Console

from cdc.metrics import registry
from cdc.position import describe_position
from cdc.queue import QueueStats
from cdc.stats import CaptureStats, CopyStatus, DeliveryStats, SlotStats, State
from cdc.status import DaemonStatus, from_json, snapshot, to_json
from cdc.status_table import render

NOW = 1_000_000.0


def queue_stats(last_seq: int) -> QueueStats:
    return QueueStats(
        batches=1,
        bytes=10,
        oldest_seconds=1.5,
        last_seq=last_seq,
        pruned_seq=0,
        max_bytes=100,
        free_disk_bytes=1000,
        full=False,
        min_free_bytes=50,
    )


def take(capture: CaptureStats, *sinks: DeliveryStats) -> DaemonStatus:
    return snapshot(
        version="1",
        started_at=NOW - 100,
        sources=[(capture, queue_stats(last_seq=7))],
        sinks=sinks,
        now=NOW,
    )


def running(**fields: object) -> CaptureStats:
    stats = CaptureStats("shop", State.RUNNING, received=1000, server_end=1000, confirmed=1000)
    for name, value in fields.items():
        setattr(stats, name, value)
    return stats


def delivering(**fields: object) -> DeliveryStats:
    stats = DeliveryStats("mirror", "shop", State.RUNNING, position=900, seq=7)
    for name, value in fields.items():
        setattr(stats, name, value)
    return stats


def test_idle_pipeline_has_no_lag() -> None:
    """An hour without a commit is not an hour of lag, and a sink need not store every keepalive's position."""
    status = take(running(last_commit_time=NOW - 3600), delivering(last_commit_time=NOW - 3600))
    source, sink = status.sources["shop"], status.sinks["mirror"]
    assert (source.lag_seconds, source.lag_bytes) == (0.0, 0)
    assert (sink.lag_seconds, sink.lag_bytes) == (0.0, 0)


def test_first_commit_after_an_idle_hour_is_not_an_hour_late() -> None:
    capture = running(server_end=1500, last_commit_time=NOW - 3600, caught_up_at=NOW - 2)
    source = take(capture).sources["shop"]
    assert (source.lag_seconds, source.lag_bytes) == (2.0, 500)


def test_lag_of_a_sink_spans_the_whole_way_from_the_server() -> None:
    sink = delivering(seq=3, position=400, last_commit_time=NOW - 50)
    status = take(running(server_end=1200), sink).sinks["mirror"]
    assert (status.lag_seconds, status.lag_bytes) == (50.0, 800)


def test_sink_that_applied_everything_is_as_late_as_its_source() -> None:
    capture = running(server_end=1600, last_commit_time=NOW - 9)
    status = take(capture, delivering(last_commit_time=NOW - 400)).sinks["mirror"]
    assert (status.lag_seconds, status.lag_bytes) == (9.0, 600)


@pytest.mark.parametrize("state", [State.WAITING, State.FAILED, State.PAUSED])
def test_lag_grows_in_time_and_is_unknown_in_bytes_while_nothing_is_heard_of_the_source(state: State) -> None:
    """What the server told before it went away says nothing about now."""
    capture = running(state=state, error="connection refused", caught_up_at=NOW - 60)
    behind = delivering(position=400, seq=3, caught_up_at=NOW - 90)
    for sink, seconds in ((delivering(), 60.0), (behind, 90.0)):
        status = take(capture, sink)
        assert (status.sources["shop"].lag_seconds, status.sources["shop"].lag_bytes) == (60.0, None)
        assert (status.sinks["mirror"].lag_seconds, status.sinks["mirror"].lag_bytes) == (seconds, None)


def test_lag_is_unknown_before_anything_is_known() -> None:
    source = take(CaptureStats("shop"), DeliveryStats("mirror", "shop"))
    assert source.sources["shop"].lag_seconds is None
    assert source.sinks["mirror"].lag_bytes is None


def test_f88_clock_ahead_at_the_source_gives_no_negative_lag() -> None:
    capture = running(server_end=1001, last_commit_time=NOW + 30)
    assert take(capture).sources["shop"].lag_seconds == 0.0


def test_opaque_positions_are_shown_and_not_subtracted() -> None:
    capture = CaptureStats("docs", State.RUNNING, received=b"\x82\x01", confirmed=b"\x82\x01", server_end=b"\x82\x02")
    source = take(capture).sources["docs"]
    assert (source.received, source.lag_bytes) == ("8201", None)


@pytest.mark.parametrize("state", [State.FAILED, State.WAITING, State.STOPPED])
def test_pipeline_in_trouble_makes_the_daemon_unhealthy(state: State) -> None:
    status = take(running(), delivering(state=state, error="no such table", hint="create it"))
    assert not status.healthy
    assert status.problems == (f"mirror: {state}: no such table",)
    assert status.sinks["mirror"].hint == "create it"


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.COPYING, State.HELD, State.STARTING])
def test_pipeline_at_work_is_healthy(state: State) -> None:
    assert take(running(), delivering(state=state)).healthy


@pytest.mark.parametrize(("wal_status", "healthy"), [("reserved", True), ("unreserved", False), ("lost", False)])
def test_f9_slot_about_to_be_lost_is_a_problem(wal_status: str, healthy: bool) -> None:
    assert take(running(slot=SlotStats("cdc_shop", wal_status=wal_status))).healthy is healthy


def test_dead_changes_are_a_problem() -> None:
    assert take(running(), delivering(dead=2)).problems == ("mirror: 2 changes are dead",)


@pytest.mark.parametrize(
    ("state", "ready"),
    [(State.RUNNING, True), (State.PAUSED, True), (State.STARTING, False), (State.WAITING, False)],
)
def test_ready_once_all_sources_are_connected(state: State, ready: bool) -> None:
    assert take(running(state=state)).ready is ready


def test_json_and_back() -> None:
    copy = CopyStatus(1, 2, 10, 20, 100, 200, seconds_left=1.5)
    capture = running(slot=SlotStats("s", True, "reserved", 5, None, 17, 18), insert_only=("public.log",))
    status = take(capture, delivering(copy=lambda: copy))
    assert from_json(to_json(status)) == status


def test_f108_snapshot_is_cheap_and_does_not_grow() -> None:
    """A thousand snapshots of a busy daemon take well under a second and keep one size."""
    capture, sink = running(), delivering()
    sizes = set()
    began = time.thread_time()
    for _ in range(1000):
        capture.changes["insert"] += 1
        sizes.add(len(to_json(take(capture, sink))) - len(str(capture.changes["insert"])))
    assert len(sizes) == 1
    assert time.thread_time() - began < 1


def test_resume_tokens_are_shown_as_times() -> None:
    token = b"1\x00\x00\x00\x02_data\x00!\x00\x00\x00826553F100000000022B0429296E1404\x00\x00"
    assert describe_position(token.hex()) == "2023-11-14 22:13:20"
    assert describe_position("16/B374D848") == "16/B374D848"
    assert describe_position("") == ""
    assert describe_position("ab" * 30) == "ab" * 10 + "…"


def test_f89_parked_changes_are_shown_and_are_no_trouble_until_they_are_dead() -> None:
    status = take(running(), delivering(parked=3, waiting=1, parked_oldest_at=NOW - 60))
    sink = status.sinks["mirror"]
    assert status.healthy
    assert (sink.parked, sink.dead, sink.torn, sink.parked_oldest_seconds) == (3, 0, True, 60.0)
    assert from_json(to_json(status)) == status
    exposed = generate_latest(registry(lambda: status)).decode()
    assert 'cdc_parked_changes{sink="mirror",state="retrying"} 2.0' in exposed
    assert 'cdc_parked_changes{sink="mirror",state="waiting"} 1.0' in exposed
    assert 'cdc_parked_changes{sink="mirror",state="dead"} 0.0' in exposed
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(status))
    assert "mirror: 3 changes are parked (0 dead), the oldest for 1 min 0 s: transactions are torn" in captured.get()
    assert not take(running(), delivering(parked=3, dead=1)).healthy
    assert not take(running(), delivering()).sinks["mirror"].torn


def test_disk_and_slot_can_be_watched() -> None:
    """What is alarmed about before the source has to wait, or its server gives its WAL up."""
    status = take(running(slot=SlotStats("cdc_shop", wal_status="unreserved")), delivering())
    exposed = generate_latest(registry(lambda: status)).decode()
    assert 'cdc_queue_free_disk_bytes{source="shop"} 1000.0' in exposed
    assert 'cdc_queue_min_free_bytes{source="shop"} 50.0' in exposed
    assert 'cdc_slot_wal_status{slot="cdc_shop",source="shop",status="unreserved"} 1.0' in exposed
    assert 'cdc_slot_wal_status{slot="cdc_shop",source="shop",status="lost"} 0.0' in exposed
