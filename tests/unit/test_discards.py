"""What is given up while no daemon runs is told by the next one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import structlog

from cdc.discards import Discard, keep, tell_kept
from cdc.queue import Queue


def discard(name: str) -> Discard:
    return Discard(id=name, sink="mirror", tables="t", state="dead", error="", reason="old", by="ann", at="")


def test_f89_discards_are_kept_for_the_next_log_and_told_once(tmp_path: Path) -> None:
    for names in (["mirror:1.0", "mirror:2.0"], ["mirror:3.0"]):
        with closing(Queue(tmp_path / "queue", max_bytes=10**9, min_free_bytes=0)) as queue:
            keep(queue, [discard(name) for name in names])
    for told in (["mirror:1.0", "mirror:2.0", "mirror:3.0"], []):
        with (
            closing(Queue(tmp_path / "queue", max_bytes=10**9, min_free_bytes=0)) as queue,
            structlog.testing.capture_logs() as logs,
        ):
            tell_kept(queue)
        assert [(each["id"], each["reason"], each["by"]) for each in logs] == [(name, "old", "ann") for name in told]
