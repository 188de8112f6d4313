"""The benchmark runs, and would notice a contender that loses something. What it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.table import SCHEMA, Backlog, BenchFailed, create_source, require_equal
from tests.servers import Database

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by way of /proc")


def bench(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "scripts.bench", *map(str, arguments)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_drain_compares_both_and_writes_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("drain", "--small", "--runs", "1", "--json", file)
    assert "native_backlog_1: " in output
    assert "cdc_backlog_1: " in output
    assert output.count("equal to its source") == 2
    found = json.loads(file.read_text())
    latencies = found["latency_ms"]
    assert sorted(latencies) == ["cdc", "native"]
    assert all(0 < each["p50"] <= each["p99"] for each in latencies.values())
    assert found["rows"] == 4_000
    numbers = ("cdc_cpu_seconds", "cdc_peak_rss_mb", "cdc_seconds", "limit_seconds", "native_seconds", "ratio")
    assert all(found[name] > 0 for name in numbers)


def test_drain_of_hot_rows_tells_what_transactions_cost(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    bench("drain", "--small", "--runs", "1", "--workload", "hot", "--json", file)
    found = json.loads(file.read_text())
    assert found["rows"] == 5_000
    assert sorted(found["ratio_by_transaction"]) == ["100_rows", "single_rows"]
    assert "latency_ms" not in found


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
    output = bench("feed", "--small", "--runs", "1", "--json", file)
    assert output.count("every change is there") == 2
    assert "5,000 changes" in output
    found = json.loads(file.read_text())
    assert (found["changes"], found["rows"]) == (4_000, 5_000)
    for asked in (found["sqlite"], found["postgres"]):
        assert all(value > 0 for name, value in asked.pop("write").items() if name != "each_seconds")
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


def test_mongodb_drains_a_backlog_and_writes_what_it_cost(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("mongodb", "--small", "--runs", "1", "--json", file)
    assert "3,000 changes" in output
    found = json.loads(file.read_text())
    assert found["rows"] == 3_000
    assert all(found[name] > 0 for name in ("cpu_us_per_change", "peak_rss_mb", "seconds"))


def test_realtime_delivers_all_and_writes_how_fast(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    output = bench("realtime", "--small", "--json", file)
    assert "1,000 of 1,000" in output
    found = json.loads(file.read_text())
    assert found["delivered"] == found["expected"] == 1_000
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["peak_rss_mb"] > 0
