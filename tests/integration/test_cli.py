"""The command line as its users see it: processes, exit codes, standard output and standard error."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from cdc.queue import Queue
from tests.command import CHECKOUT, NOWHERE, Cdc, assert_complaint, read_status
from tests.processes import free_port, wait_until
from tests.servers import Database

COMMANDS = ["check", "run", "copy", "status", "verify", "cutover", "pause", "resume", "drop"]


def test_help_and_version(cdc: Cdc) -> None:
    shown = cdc("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", cdc("--version").stdout)


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "--nonsense"], ["pause"]])
def test_usage_errors_exit_with_2(cdc: Cdc, arguments: list[str]) -> None:
    result = cdc(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["run", "--config", "x.toml"], "cdc --config ... run"),
        (["status", "--debug"], "cdc --debug status"),
        (["dead-letters", "list", "--config=x.toml"], "cdc --config ... dead-letters list"),
    ],
)
def test_options_that_go_before_the_command_say_so(cdc: Cdc, arguments: list[str], right: str) -> None:
    result = cdc(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"goes before the command: {right}" in result.stderr


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[daemon]\nnonsense = 1\n", r"cdc\.toml: daemon: .*nonsense"),
        ("[sources.shop]\nurl = 5\n", r"cdc\.toml: sources\.shop\.url: Expected `str`, got `int`"),
        (
            "[sources.shop]\nurl = '${NOT_THERE}'\n",
            r"cdc\.toml: sources\.shop\.url needs the environment variable NOT_THERE",
        ),
        ("[sources.shop\n", r"cdc\.toml: not valid TOML"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["status", "--json"]])
def test_f112_configuration_errors_exit_with_2(cdc: Cdc, command: list[str], text: str, error: str) -> None:
    cdc.file.write_text(text)
    assert_complaint(cdc(*command), 2, error, hint=".")


def test_f112_missing_file(cdc: Cdc) -> None:
    assert_complaint(cdc("check"), 2, r"cdc\.toml: No such file", hint="--config")


def test_configuration_file_from_the_environment(cdc: Cdc) -> None:
    command = [sys.executable, str(CHECKOUT / "cli.py"), "check"]
    result = subprocess.run(
        command, check=False, timeout=60, **cdc.surroundings({"CDC_CONFIG": str(cdc.folder / "other.toml")})
    )
    assert_complaint(result, 2, r"other\.toml: No such file", hint="--config")


@pytest.mark.parametrize("debug", [False, True])
def test_unexpected_errors_are_one_line_unless_debugging(cdc: Cdc, debug: bool) -> None:
    program = f"""
import sys, cli
def broken(path, **_): raise ZeroDivisionError("at {NOWHERE}")
cli.load = broken
sys.argv = ["cdc", {'"--debug",' if debug else ""} "status"]
cli.main()
"""
    result = subprocess.run([sys.executable, "-c", program], check=False, timeout=60, **cdc.surroundings())
    assert "geheim" not in result.stderr
    assert ("Traceback" in result.stderr) is debug
    if not debug:
        assert_complaint(result, 1, "unexpected: ZeroDivisionError: at postgresql://me:", hint="run with --debug")


@pytest.mark.parametrize("arguments", [["pause", "mirror"], ["resume", "mirror"], ["cutover", "mirror"]])
def test_commands_that_need_the_daemon_say_so(cdc: Cdc, arguments: list[str]) -> None:
    cdc.configure(NOWHERE)
    assert_complaint(cdc(*arguments), 1, "the daemon is not running", hint="cdc run")


def test_unknown_names_are_told_with_the_known_ones(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    assert_complaint(cdc("verify", "nobody"), 1, "no sink is called 'nobody'", hint="one of: mirror")
    assert_complaint(cdc("drop", "nobody"), 1, "no sink is called 'nobody'", hint="one of: mirror")


def test_a_table_without_its_schema_is_asked_for(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    assert_complaint(cdc("sync", "mirror", "orders", "--id", "1"), 1, "'orders' has no schema", "public.orders")


def test_check_names_an_address_that_another_program_has(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cdc.file.write_text(cdc.file.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        taken = check_of_http(cdc)
        assert (taken["level"], "cannot listen" in taken["message"]) == ("error", True)
        assert "http.address" in taken["fix"]
        assert not cdc.data_dir.exists()
    assert check_of_http(cdc)["level"] == "ok"
    with cdc.running():
        assert check_of_http(cdc)["level"] == "ok"  # it is our own daemon that listens


def check_of_http(cdc: Cdc) -> dict[str, str]:
    """What `cdc check` finds out about the address."""
    daemon = json.loads(cdc("check", "--json").stdout)["sections"][0]
    finding: dict[str, str] = next(each for each in daemon["findings"] if each["subject"] == "http")
    return finding


def test_status_without_a_daemon_reads_the_data_directory(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    cdc.data_dir.mkdir()
    queue = Queue(cdc.data_dir / "shop.queue", max_bytes=1000, min_free_bytes=0)
    queue.begin(0x16_0000_0001)
    queue.register("mirror")
    queue.set("paused:mirror", "1")
    queue.close()
    result = cdc("status", "--json")
    status = json.loads(result.stdout)
    assert result.returncode == 1
    assert status["problems"][0] == "daemon is not running"
    assert status["sources"]["shop"]["confirmed"] == "16/1"
    assert status["sinks"]["mirror"]["state"] == "paused"
    assert status["started_at"] is None
    shown = cdc("status")
    assert (shown.returncode, "daemon is not running" in shown.stdout) == (1, True)
    assert sorted(file.name for file in cdc.data_dir.iterdir()) == ["shop.queue"]


def test_status_survives_a_damaged_queue_and_a_stale_address(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    cdc.data_dir.mkdir()
    (cdc.data_dir / "shop.queue").write_bytes(b"no queue" * 5000)
    (cdc.data_dir / "http").write_text("http://127.0.0.1:1")
    result = cdc("status", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["sources"]["shop"]["state"] == "failed"


def test_f113_passwords_stay_secret_when_the_server_is_away(cdc: Cdc) -> None:
    cdc.configure(
        NOWHERE,
        daemon='log_level = "debug"',
        http='tokens = [{name = "ops", token = "geheim-token", scopes = ["admin"]}]',
    )
    for arguments in (["check"], ["verify"], ["copy", "--dry-run"], ["drop", "shop", "--yes"], ["--debug", "verify"]):
        result = cdc(*arguments)
        assert result.returncode == 1
        assert result.stdout + result.stderr
        assert "geheim" not in result.stdout + result.stderr
    with cdc.running() as process:
        wait_until(lambda: "connection" in cdc.log)
        status = wait_until(lambda: cdc("status", "--json"))
        title = Path(f"/proc/{process.pid}/cmdline").read_text() if sys.platform == "linux" else ""
    assert status.returncode == 1
    assert json.loads(status.stdout)["sources"]["shop"]["state"] == "waiting"
    assert "geheim" not in status.stdout + cdc.log + title


def test_f87_second_daemon_exits_with_a_clear_error(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    with cdc.running() as process:
        assert_complaint(cdc("run"), 1, f"is used by process {process.pid}", hint="stop it")
        assert_complaint(cdc("copy"), 1, f"is used by process {process.pid}", hint="stop the daemon first")
        assert_complaint(cdc("drop", "shop", "--yes"), 1, "is used by process", hint="stop the daemon first")
        assert process.poll() is None


def test_a_daemon_that_does_not_answer_is_not_one_that_is_down(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    commands = ("status", "status --json", "pause mirror", "log-level debug", "resync shop", "dead-letters list")
    with cdc.running() as process:
        process.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(lambda command: cdc(*command.split()), commands))
        process.send_signal(signal.SIGCONT)
    for result in results:
        assert_complaint(result, 1, rf"the daemon \(process {process.pid}\) does not answer", hint="restart")


def test_a_log_level_that_there_is_not_is_told_without_a_daemon(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    result = cdc("log-level", "loud")
    assert result.returncode == 2
    assert re.search(r"'loud' is not one of\W+'debug', 'info', 'warning', 'error'", result.stderr)
    assert_complaint(cdc("log-level", "info"), 1, "the daemon is not running", "cdc run")


def test_an_address_that_somebody_else_has_by_now_is_that_of_no_daemon(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    cdc.data_dir.mkdir()
    (cdc.data_dir / "lock").write_text("1\n")  # left by one that was killed
    with socket.create_server(("127.0.0.1", 0)) as mute:
        (cdc.data_dir / "http").write_text("http://{}:{}".format(*mute.getsockname()))
        assert_complaint(cdc("pause", "mirror"), 1, "the daemon is not running", hint="cdc run")


def test_f86_status_names_a_data_directory_that_was_removed(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    with cdc.running():
        url = cdc.address.url
        wait_until(lambda: cdc.status()["sources"]["shop"]["queue"], what="the queue to be open")
        shutil.rmtree(cdc.data_dir)
        with urlopen(f"{url}/status", timeout=60) as answer:
            status = read_status(answer.read())
        with urlopen(f"{url}/metrics", timeout=60) as answer:
            assert b'cdc_queue_full{source="shop"} 1' in answer.read()
    assert not status["healthy"]
    assert [problem for problem in status["problems"] if "shop.queue was removed" in problem]
    assert "Traceback" not in cdc.log


def test_f86_a_daemon_is_found_without_its_data_directory(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    address = f"127.0.0.1:{free_port()}"
    cdc.file.write_text(cdc.file.read_text().replace("127.0.0.1:0", address))
    with cdc.running():
        wait_until(lambda: cdc.status()["sources"]["shop"]["queue"], what="the queue to be open")
        shutil.rmtree(cdc.data_dir)
        second = cdc("run")
        assert_complaint(second, 1, f"cannot listen on {address}", hint="cdc answers there")
        status = read_status(cdc("status", "--json").stdout)
        assert status["started_at"] is not None
        assert [problem for problem in status["problems"] if "shop.queue was removed" in problem]
        assert cdc("log-level", "debug").returncode == 0
        cdc.file.write_text(cdc.file.read_text().replace("sinks.mirror", "sinks.another"))
        assert_complaint(cdc("log-level", "debug"), 1, "the daemon is not running", hint="cdc run")
    assert "log level changed" in cdc.log


def test_f86_no_token_is_shown_to_who_may_have_taken_the_port(cdc: Cdc) -> None:
    cdc.configure(NOWHERE, http='[[http.tokens]]\nname = "ops"\ntoken = "abcdefghijklmnop"\nscopes = ["admin"]')
    cdc.file.write_text(cdc.file.read_text().replace("127.0.0.1:0", f"127.0.0.1:{free_port()}"))
    with cdc.running():
        wait_until(lambda: cdc("log-level", "info").returncode == 0, what="the daemon to answer")
        shutil.rmtree(cdc.data_dir)
        assert_complaint(cdc("log-level", "debug"), 1, "nothing in .* tells of a daemon", hint="end its process")


@pytest.mark.parametrize("arguments", [["copy"], ["copy", "--dry-run"], ["verify"], ["drop", "mirror", "--yes"]])
def test_server_that_is_away_is_one_line(cdc: Cdc, arguments: list[str]) -> None:
    cdc.configure(NOWHERE)
    assert_complaint(cdc(*arguments), 1, "127.0.0.1.*port 1", hint="is the server running")


def test_drop_asks_first(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    result = cdc("drop", "shop")
    assert result.returncode == 1
    assert "Drop slot cdc_shop" in result.stderr
    assert "cannot" not in result.stderr


@pytest.fixture
def shop(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> Database:
    """A source with two tables, configured with an empty mirror."""
    source_db.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
    source_db.execute("CREATE TABLE customers (id serial PRIMARY KEY, name text NOT NULL)")
    source_db.execute("INSERT INTO orders SELECT n, 'note ' || n FROM generate_series(1, 100) AS n")
    source_db.execute("INSERT INTO customers (name) VALUES ('ann'), ('bob')")
    cdc.configure(source_db.url, target_db.url, source=f'pg_dump = "{pg_dump}"')
    return source_db


def test_what_would_be_copied_as_json(cdc: Cdc, shop: Database) -> None:
    shop.execute("ANALYZE orders; ANALYZE customers")

    def planned() -> dict[str, Any]:
        result = cdc("copy", "--dry-run", "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout).keys() == {"sinks"}
        return {table.pop("table"): table for table in json.loads(result.stdout)["sinks"]["mirror"]}

    before = planned()
    assert {name: (table["rows"], table["copied"]) for name, table in before.items()} == {
        "public.orders": (100, False), "public.customers": (2, False)
    }  # fmt: skip
    assert all(table["bytes"] > 0 for table in before.values())
    assert cdc("copy").returncode == 0
    assert all(table["copied"] for table in planned().values())
    assert_complaint(cdc("copy", "--json"), 1, "--json goes with --dry-run", "cdc status --json")


def test_mirror_from_empty_to_dropped(cdc: Cdc, shop: Database, target_db: Database) -> None:
    """What a user does with a mirror in its life."""
    checked = cdc("check")
    assert checked.returncode == 0, checked.stdout
    planned = cdc("copy", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"mirror\s+public\.orders\s+.*to copy", planned.stdout)

    with cdc.running() as process:
        cdc.wait_for_sink("running")
        shop.execute("INSERT INTO orders VALUES (101, 'late')")
        shop.execute("DELETE FROM orders WHERE id = 1")
        wait_until(
            lambda: target_db.value("SELECT min(id) || ' ' || max(id) FROM orders") == "2 101",
            what=lambda: f"changes to arrive: {cdc.status()}\n{cdc.log}",
        )
        verified = cdc("verify", "--json")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert json.loads(verified.stdout)["sinks"]["mirror"]["exact"] is True

        target_db.execute("UPDATE orders SET note = 'wrong' WHERE id = 50")
        different = cdc("verify", "mirror")
        assert (different.returncode, "50" in different.stdout) == (1, True), different.stdout
        target_db.execute("UPDATE orders SET note = 'note 50' WHERE id = 50")

        assert cdc("pause", "mirror").returncode == 0
        cdc.wait_for_sink("paused")
        assert cdc("resume", "mirror").returncode == 0
        cdc.wait_for_sink("running")
        shown = cdc("status")
        assert (shown.returncode, "healthy" in shown.stdout) == (0, True), shown.stdout
    assert process.returncode == 0, cdc.log

    assert cdc("status").returncode == 1
    assert cdc("drop", "mirror", "--yes").returncode == 0
    assert target_db.value("SELECT count(*) FROM cdc.positions") == 0
    dropped = cdc("drop", "shop", "--yes")
    assert dropped.returncode == 0, dropped.stderr
    assert shop.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'cdc_shop'") == 0
    assert shop.value("SELECT count(*) FROM pg_publication") == 0
    assert not list(cdc.data_dir.glob("shop.queue*"))
    assert target_db.value("SELECT count(*) FROM orders") == 100


def test_f28_f102_verify_names_what_is_wrong_with_a_new_column(cdc: Cdc, shop: Database, target_db: Database) -> None:
    with cdc.running():
        cdc.wait_for_sink("running")
        shop.execute("ALTER TABLE orders ADD COLUMN price int NOT NULL DEFAULT 7")
        shop.execute("INSERT INTO orders VALUES (101, 'the last', 8)")
        wait_until(lambda: target_db.value("SELECT count(*) = 101 FROM orders"), what=lambda: cdc.log)
        assert cdc("verify").returncode == 0
        target_db.execute("UPDATE orders SET price = 0 WHERE id = 42")
        report = cdc("verify")
        assert report.returncode == 1
        assert "public.orders different: (42)\n" in report.stdout
        target_db.execute("ALTER TABLE orders DROP COLUMN price")
        report = cdc("verify")
        assert report.returncode == 1
        assert "public.orders has no column price" in report.stdout


def test_copy_alone_then_run_goes_on(cdc: Cdc, shop: Database, target_db: Database) -> None:
    copied = cdc("copy")
    assert copied.returncode == 0, copied.stderr
    assert copied.stdout == f"mirror: 2 tables copied, 102 rows in {copied.stdout.rpartition(' in ')[2]}"
    shop.execute("INSERT INTO orders VALUES (101, 'between')")
    with cdc.running():
        wait_until(lambda: target_db.value("SELECT count(*) FROM orders") == 101, what=lambda: cdc.log)


def test_copy_tells_what_is_left_to_the_stream(cdc: Cdc, shop: Database, target_db: Database) -> None:
    """Tables of two snapshots do not fit together yet."""
    assert cdc("copy").returncode == 0
    shop.execute("CREATE TABLE later (id int PRIMARY KEY, n int UNIQUE)")
    copied = cdc("copy")
    assert copied.returncode == 0, copied.stderr
    assert "mirror: `cdc run` builds the rest (indexes, constraints)" in copied.stdout
    unique = "SELECT EXISTS (SELECT FROM pg_constraint WHERE conname = 'later_n_key')"
    assert not target_db.value(unique)
    with cdc.running():
        wait_until(lambda: target_db.value(unique), what=lambda: cdc.log)


def test_cut_over(cdc: Cdc, shop: Database, target_db: Database) -> None:
    with cdc.running():
        cdc.wait_for_sink("running")
        result = cdc("cutover", "mirror")
        assert result.returncode == 0, result.stdout + result.stderr
        again = cdc("cutover", "mirror", "--json")
        assert json.loads(again.stdout)["verdict"] == "ready", again.stderr
    assert "READY" in result.stdout
    assert target_db.value("INSERT INTO customers (name) VALUES ('eve') RETURNING id") == 3


def test_check_names_what_is_wrong(cdc: Cdc, shop: Database) -> None:
    shop.execute("CREATE TABLE keyless (note text)")
    result = cdc("check", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["ok"] is False
    assert "keyless" in result.stdout
