"""The benchmark runs, and would notice a contender that loses something. What it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.benchmarks.background import beside
from tests.benchmarks.copy_source import create, fingerprint, require_copied
from tests.benchmarks.table import SCHEMA, Backlog, BenchFailed, create_source, require_equal
from tests.servers import Database

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by way of /proc")


def bench(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "scripts.bench", *map(str, arguments)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_finds_every_number(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("all", "--small", "--json", file)
    assert "All parts ended well" in output
    assert output.count("equal to its source") >= 9  # two contenders of three backlogs, two copiers, MongoDB
    assert output.count("every change is there") == 2
    found = json.loads(file.read_text())
    del found["surroundings"]
    assert list(found) == ["1", "2", "3", "4", "5", "6", "7", "8"]
    assert all(isinstance(number["holds"], bool) for number in found.values())
    assert all(number["found"] != "failed" for number in found.values())
    drain, hot = found["1"]["details"]["drain"], found["2"]["details"]["hot"]
    assert (drain["rows"], hot["rows"]) == (4_000, 5_000)
    numbers = ("cdc_cpu_seconds", "cdc_peak_rss_mb", "cdc_seconds", "limit_seconds", "native_seconds", "ratio")
    assert all(each[name] > 0 for name in numbers for each in (drain, hot))
    assert all(0 < each["p50"] <= each["p99"] for each in drain["latency_ms"].values())
    assert sorted(hot["ratio_by_transaction"]) == ["100_rows", "single_rows"]
    assert found["4"]["details"]["copy"]["ratio"]["pg_dump"] > 0
    assert found["6"]["details"]["mongodb"]["rows"] == 3_000
    assert found["8"]["details"]["soak"]["samples"] > 0


def test_limit_reads_all_of_the_backlog() -> None:
    *_, woken, napping = bench("limit", "--small").splitlines()
    for line in (woken, napping):
        messages = int(line.split()[3].replace(",", ""))
        assert messages >= 3_000 + 2 * 3 + 3 * 1_000  # rows in three transactions, then one a transaction


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM item WHERE id = 7",
        "INSERT INTO item (id) VALUES (-1)",
        "UPDATE item SET price = price + 0.000 WHERE id = 7",
        "UPDATE item SET note = NULL WHERE id = 7",
        "UPDATE item SET id = -7 WHERE id = 7",
    ],
)
def test_what_is_lost_or_changed_is_noticed(source_db: Database, target_db: Database, damage: str) -> None:
    create_source(source_db)
    Backlog(inserts=1_000, updates=10).write(source_db)
    target_db.execute(SCHEMA)
    with target_db.connect() as target:
        target.cursor().executemany(
            "INSERT INTO item VALUES (%s, %s, %s, %s, %s, %s, %s)", source_db.execute("TABLE item")
        )
    require_equal(source_db, target_db)
    target_db.execute(damage)
    with pytest.raises(BenchFailed, match="differs"):
        require_equal(source_db, target_db)


def test_feed_is_polled_in_both_stores(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("feed", "--small", "--only", "polls", "--json", file)
    assert "5,000 changes" in output
    found = json.loads(file.read_text())
    assert found["rows"] == 5_000
    for asked in (found["sqlite"], found["postgres"]):
        assert asked.pop("store_rows_per_second") > 0
        assert len(asked) == 10
        assert all(0 < each["p50_ms"] <= each["p99_ms"] for each in asked.values())


def test_poison_is_refused_and_everything_else_flows(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("poison", "--small", "--runs", "1", "--refused", "4", "--json", file)
    assert "6,000 changes of 2,000 keys" in output
    found = json.loads(file.read_text())
    assert {name: found.pop(name) for name in ("keys", "refused", "rows")} == {
        "keys": 2_000,
        "refused": 4,
        "rows": 6_000,
    }
    steady = found.pop("steady")
    del found["surroundings"]
    assert sorted(found) == sorted(steady)
    assert all(value > 0 for value in found.values())
    assert all(value >= 0 for value in steady.values())


def test_realtime_delivers_all_and_writes_how_fast(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("realtime", "--small", "--json", file)
    assert "1,000 of 1,000" in output
    found = json.loads(file.read_text())
    assert found["delivered"] == found["expected"] == 1_000
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["peak_rss_mb"] > 0


def test_a_copy_that_lacks_something_is_noticed(source_db: Database, target_db: Database) -> None:
    for database in (source_db, target_db):
        create(database, 500_000)
    expected = fingerprint(source_db)
    require_copied(target_db, expected)
    for damage, what in (
        ("DELETE FROM payment WHERE order_id = 1", "payment"),
        ("UPDATE event SET value = value + 1 WHERE id = 1", "event, payment"),
        ("DROP INDEX event_happened_at_idx", "definitions, event, payment"),
    ):
        target_db.execute(damage)
        with pytest.raises(BenchFailed, match=f"differs from its source in {what}$"):
            require_copied(target_db, expected)


def test_an_interrupted_benchmark_does_not_wait_for_its_statements(source_db: Database) -> None:
    with (
        pytest.raises(SystemExit),
        beside(source_db, lambda: source_db.execute("SELECT pg_sleep(1000)")) as statement,
    ):
        sys.exit(143)
    assert isinstance(statement.exception(), psycopg.OperationalError)
