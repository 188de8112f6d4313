"""A process that fills a queue and tells what has become durable, until it is killed.

    python -m tests.faults.queue_writer FILE stream|steps [COUNT]

stream: appends without waiting, prints `durable POSITION` whenever the queue's position has moved; every fifth
    transaction has three parts; a sink stays 50 transactions behind, so that the queue is pruned, and full at times.
steps: appends COUNT batches, and waits for each one before it prints.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from cdc.errors import CdcError
from cdc.position import as_lsn
from cdc.queue import Queue
from tests.batches import STRIDE, batch, end_of, transaction
from tests.processes import wait_until

MAX_BYTES = 2 << 20


def say(*words: object) -> None:
    """One system call a line: a kill leaves no half of one in a buffer."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def stream(queue: Queue) -> None:
    threading.Thread(target=follow, args=(queue,), daemon=True).start()
    reported = queue.position
    number = (as_lsn(reported or 0) - 8) // STRIDE
    while True:
        number += 1
        size = 200 + number * 7919 % 20_000
        for part in transaction(number, parts=3 if number % 5 == 0 else 1, size=size):
            wait_until(lambda: queue.has_room, what="room in the queue")
            queue.append(part)
        if queue.position != reported:
            reported = queue.position
            say("durable", reported)


def follow(queue: Queue) -> None:
    cursor = queue.cursor("mirror")
    assert cursor is not None
    seq, _ = cursor  # what is before it may be pruned at any moment
    ends: list[tuple[int, int]] = []
    while True:
        for stored in queue.read(seq, max_bytes=1 << 20, timeout_seconds=60):
            seq = stored.seq
            if stored.batch.complete:
                ends.append((stored.seq, as_lsn(stored.batch.position)))
        if len(ends) > 50:
            queue.advance("mirror", *ends[-50])
            del ends[:-50]


def steps(queue: Queue, count: int) -> None:
    try:
        for number in range(1, count + 1):
            queue.append(batch(number))
            queue.flush(60)
            say("durable", end_of(number))
    except CdcError as exc:
        say("failed", type(exc).__name__, queue.position, queue.stats().last_seq)
        try:
            queue.append(batch(number))
        except CdcError as again:
            say("refused", type(again).__name__)
        os._exit(3)


def main() -> None:
    queue = Queue(Path(sys.argv[1]), max_bytes=MAX_BYTES, min_free_bytes=0)
    if queue.position is None:
        queue.begin(end_of(0))
    queue.register("mirror")
    if sys.argv[2] == "stream":
        stream(queue)
    steps(queue, int(sys.argv[3]))


if __name__ == "__main__":
    main()
