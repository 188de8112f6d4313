"""The workload that other tests trust: it does all that it promises, and leaves no trace of what it rolled back."""

from __future__ import annotations

from tests import shop
from tests.processes import wait_until
from tests.servers import Database, PostgresServer


def test_the_workload_runs_every_action_and_keeps_the_sum(postgres: PostgresServer, source_db: Database) -> None:
    with source_db.connect() as connection:
        shop.create(connection)
        shop.fill(connection)
        total = shop.balance_total(connection)
        with shop.Workload(source_db.url) as workload:
            wait_until(lambda: workload.transactions > 500 and workload.counts["start_import_over"] > 2)
        assert shop.balance_total(connection) == total
    assert set(workload.counts) >= {action.__name__ for action, _ in shop._ACTIONS} - {"change_mind"}
    assert workload.counts["rolled back"]
    assert source_db.value("SELECT count(*) FROM import_lines WHERE line = 'must never be seen'") == 0


def test_the_workload_survives_a_crash_of_its_server(postgres18: PostgresServer, source_db: Database) -> None:
    with source_db.connect() as connection:
        shop.create(connection)
        shop.fill(connection)
    with shop.Workload(source_db.url) as workload:
        wait_until(lambda: workload.transactions > 20)
        postgres18.kill()
        postgres18.start()
        before = workload.transactions
        wait_until(lambda: workload.transactions > before + 20)
    assert workload.counts["lost connection"]
