"""Kill the daemon with -9 again and again while a load runs, the databases' servers now and then, and compare.

Every process is real: the `cdc` command, two PostgreSQL servers. A watcher looks at the mirror all the time. Exit code
0 only if it saw nothing that cannot be, and both databases are equal at the end, row by row and by `cdc verify`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from tests.command import Cdc
from tests.faults import crash_mongodb
from tests.faults.crash_load import SCHEMA, TABLES, Load
from tests.faults.crash_watch import Watcher
from tests.faults.daemon import Daemon
from tests.mongod.process import STAND_IN, StandIn, start_server
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

PROGRESS_SECONDS: Final = 60
"""Within this time the mirror moves on, whatever was killed before, or the test fails."""

CATCH_UP_SECONDS: Final = 120

_REPORT_SECONDS: Final = 5


class CrashTestFailed(Exception):
    """Something was lost, doubled, torn, out of order, or stands still; the message says what."""


class Strike(NamedTuple):
    """When the daemon is killed, and what else.

    starting: `seconds` count from its start; otherwise from when it has moved the mirror on.
    server: which database server is killed too, and `gap_seconds` later the daemon.
    survives: the daemon sees that server come back, and is killed only when it has gone on.
    """

    starting: bool
    seconds: float
    server: Literal["", "source", "target"]
    gap_seconds: float
    survives: bool


class Result(msgspec.Struct):
    """What happened. `killed_while` counts the kills by what the daemon was doing."""

    seed: int
    kills: int = 0
    killed_while: dict[str, int] = {}
    server_kills: dict[str, int] = {}
    daemon_starts: int = 0
    transactions: int = 0
    looks: int = 0
    rows_compared: int = 0
    seconds: float = 0.0
    problems: list[str] = []


def draw_strikes(seed: int, count: int) -> list[Strike]:
    """The same seed draws the same strikes. The first few may hit the initial copy."""
    rng = random.Random(seed)
    return [
        Strike(
            starting=number < 3 or rng.random() < 0.3,
            seconds=rng.uniform(0.05, 2.5 if number < 3 else 1.5),
            server=rng.choices(("target", "source", ""), (4, 2, 26))[0],
            gap_seconds=rng.uniform(0, 0.3),
            survives=rng.random() < 0.5,
        )
        for number in range(count)
    ]


class CrashTest:
    """One run. progress: is told how far it is, a line at a time."""

    def __init__(self, folder: Path, *, kills: int, seed: int, progress: Callable[[str], None]) -> None:
        self.result = Result(seed)
        self._folder = folder
        self._strikes = draw_strikes(seed, kills)
        self._progress = progress
        self._started_at = self._reported_at = time.monotonic()
        self._position_at_start = 0

    def run(self) -> Result:
        """Run it. Problems are in the result; only what is wrong with the test itself is raised."""
        with ExitStack() as stack:
            servers = {name: stack.enter_context(PostgresServer(fsync=True)) for name in ("source", "target")}
            self._servers = servers
            self._source, self._target = (server.create_database("shop") for server in servers.values())
            self._source.execute(SCHEMA)
            self._daemon = Daemon(
                self._folder,
                source=self._source.url,
                target=self._target.url,
                pg_dump=servers["source"].bin_dir / "pg_dump",
            )
            self._load = stack.enter_context(Load(self._source.url, seed=self.result.seed))
            self._watcher = stack.enter_context(Watcher(self._target.url))
            stack.enter_context(self._daemon)
            self.result.daemon_starts = 1
            try:
                self._perform()
            except CrashTestFailed as exc:
                self.result.problems.append(str(exc))
            finally:
                self.result.transactions, self.result.looks = self._load.transactions, self._watcher.looks
        self.result.seconds = round(time.monotonic() - self._started_at, 1)
        return self.result

    def _perform(self) -> None:
        for strike in self._strikes:
            self._wait_for(strike)
            self._carry_out(strike)
            self._report()
        self._await_progress()
        self._load.stop()
        self._catch_up()
        self._look_closely()
        self._compare()

    # striking

    def _wait_for(self, strike: Strike) -> None:
        if not strike.starting:
            self._await_progress()
        time.sleep(strike.seconds)

    def _carry_out(self, strike: Strike) -> None:
        server = self._servers[strike.server] if strike.server else None
        if server is not None:
            server.kill()
            self._count(self.result.server_kills, strike.server)
            if strike.survives:
                server.start()
                self._await_progress(since=self._watcher.position)
            else:
                time.sleep(strike.gap_seconds)
        self._kill_and_start()
        if server is not None and not server.running:
            server.start()

    def _kill_and_start(self) -> None:
        if not self._daemon.running:
            raise CrashTestFailed(f"the daemon ended by itself; its log ends:\n{self._daemon.log_tail()}")
        self._daemon.kill()
        self.result.kills += 1
        self._count(self.result.killed_while, self._activity)
        self._position_at_start = self._watcher.position
        self._daemon.start()
        self.result.daemon_starts += 1

    @property
    def _activity(self) -> str:
        if not self._watcher.position:
            return "copying"
        return "delivering" if self._watcher.position > self._position_at_start else "starting"

    def _await_progress(self, since: int | None = None) -> None:
        """Wait until the mirror has moved on since the daemon's start, or since a position."""
        before = self._position_at_start if since is None else since
        self._await(lambda: self._watcher.position > before, "the mirror to move on", PROGRESS_SECONDS)

    def _await(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        def settled() -> bool:
            return condition() or bool(self._watcher.problems) or not self._daemon.running

        try:
            wait_until(settled, timeout_seconds=seconds, what=what)
        except TimeoutError as exc:
            raise CrashTestFailed(f"{exc}; the daemon's log ends:\n{self._daemon.log_tail()}") from None
        self._check_watcher()
        if not self._daemon.running:
            raise CrashTestFailed(f"the daemon ended by itself; its log ends:\n{self._daemon.log_tail()}")

    # the end

    def _catch_up(self) -> None:
        """What commits last arrives last."""
        marker = f"the end {uuid.uuid4()}"
        self._source.execute("INSERT INTO scratch (line) VALUES (%s)", [marker])
        seen = "SELECT EXISTS (SELECT FROM scratch WHERE line = %s)"
        self._await(lambda: bool(self._target.value(seen, [marker])), "the mirror to catch up", CATCH_UP_SECONDS)

    def _look_closely(self) -> None:
        """Once more at the mirror at rest."""
        looks = self._watcher.looks
        self._await(lambda: self._watcher.looks > looks + 1, "a look at the mirror", PROGRESS_SECONDS)

    def _check_watcher(self) -> None:
        if self._watcher.problems:
            raise CrashTestFailed(f"seen in the mirror: {'; '.join(self._watcher.problems)}")

    def _compare(self) -> None:
        for table in TABLES:
            rows, problem = compare(self._source, self._target, table)
            self.result.rows_compared += rows
            self.result.problems += problem
        verified = self._daemon.ask("verify")
        if verified.returncode:
            self.result.problems.append(f"cdc verify: {verified.stdout}{verified.stderr}")
        status = self._daemon.ask("status", "--json")
        if status.returncode:
            self.result.problems.append(f"cdc status: {status.stdout}{status.stderr}")

    # reporting

    def _count(self, counts: dict[str, int], what: str) -> None:
        counts[what] = counts.get(what, 0) + 1

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported_at > _REPORT_SECONDS or self.result.kills == len(self._strikes):
            self._reported_at = now
            self._progress(
                f"{self.result.kills}/{len(self._strikes)} kills, {self._load.transactions:,} transactions, "
                f"{self._watcher.looks:,} looks, {now - self._started_at:.0f} s"
            )


def compare(source: Database, target: Database, table: str) -> tuple[int, list[str]]:
    """Compare the exact text of all rows, equal ones counted: the number of rows, and what differs."""
    query = f"SELECT row::text FROM {table} AS row"
    ours, theirs = (Counter(row for (row,) in database.execute(query)) for database in (source, target))
    missing, extra = ours - theirs, theirs - ours
    problems = [
        f"{table}: {rows.total()} rows {what}, as {next(iter(rows))[:100]}"
        for what, rows in (("are missing from the mirror", missing), ("are too many in the mirror", extra))
        if rows
    ]
    return ours.total(), problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test, say what happened, return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended
    folder = Path(tempfile.mkdtemp(prefix="cdc-crash-"))
    try:
        if options.mongodb:
            return _crash_mongodb(folder, options)
        result = CrashTest(folder, kills=options.kills, seed=options.seed, progress=_say).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _write(options.json, result)
    _print(result)
    return 1 if result.problems else 0


def _crash_mongodb(folder: Path, options: argparse.Namespace) -> int:
    """Half of the kills with looked-up documents, half with deltas alone."""
    results = []
    with start_server() as server:
        _say(f"server               {STAND_IN if isinstance(server, StandIn) else 'mongod'}")
        for full_document in ("updateLookup", "off"):
            place = folder / full_document
            place.mkdir()
            test = crash_mongodb.CrashTest(
                Cdc(place), server.url, f"crash_{full_document}",
                kills=options.kills // 2, seed=options.seed, full_document=full_document, faults=True,
            )  # fmt: skip
            results.append(result := test.run(_say))
            _say(f"full_document        {full_document}")
            _say(f"kills of the daemon  {result.kills}, seed {result.seed}, failing commands in {result.faults} lives")
            _say(f"writes               {result.writes:,} rounds")
            for problem in result.problems:
                _say(f"PROBLEM: {problem}")
            if not result.problems:
                _say(f"Equal: {result.documents:,} documents, byte for byte. Nothing lost, nothing doubled.")
    _write(options.json, results)
    return 1 if any(result.problems for result in results) else 0


def _write(file: Path | None, result: object) -> None:
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")


def _print(result: Result) -> None:
    times = ", ".join(f"{count} while {activity}" for activity, count in sorted(result.killed_while.items()))
    crashes = ", ".join(f"{count} of the {server}" for server, count in sorted(result.server_kills.items())) or "none"
    _say(f"kills of the daemon  {result.kills} ({times}), seed {result.seed}")
    _say(f"kills of a server    {crashes}")
    _say(f"restarts             {result.daemon_starts - 1}")
    _say(f"transactions         {result.transactions:,}, {result.looks:,} snapshots of the mirror looked at")
    _say(f"time                 {result.seconds:.0f} s")
    for problem in result.problems:
        _say(f"PROBLEM: {problem}")
    if not result.problems:
        _say(f"Equal: {result.rows_compared:,} rows in {len(TABLES)} tables. Nothing lost, nothing doubled.")


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how often the daemon is killed (200)")
    parser.add_argument("--seed", type=int, default=1, help="chooses load and moments (1)")
    parser.add_argument("--mongodb", action="store_true", help="of MongoDB mirrors, while the server fails too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
