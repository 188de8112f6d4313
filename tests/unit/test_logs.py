"""What reaches the log, and what does not."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import structlog

from cdc import logs
from cdc.secret import Secret

URL = "postgresql://me:geheim@db/shop"
MESSAGE = f"connecting to {URL}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Writes(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return super().write(text)


def logged(write: Any, log_format: logs.Format = "json", level: str = "info", stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    logs.configure(log_format, level, stream)
    write(structlog.get_logger())
    return stream.getvalue()


def raise_and_log(log: Any) -> None:
    try:
        raise ValueError(f"cannot reach {URL}")
    except ValueError:
        log.exception("broken")


def full_disk() -> TextIO:
    return Path("/dev/full").open("w", buffering=1)


def pipe_that_nobody_reads() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


@pytest.mark.parametrize("opened", [full_disk, pipe_that_nobody_reads])
def test_f86_a_log_that_cannot_be_written_stops_nobody(
    opened: Callable[[], TextIO], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither ours nor that of libraries."""
    stream = opened()
    logs.configure("json", "info", stream)
    for _ in range(1_000):  # more than is buffered
        structlog.get_logger().info("applied", changes=3)
        logging.getLogger("library").warning("lost")
    with suppress(OSError):
        stream.close()


def test_one_line_of_json_a_fact() -> None:
    text = logged(lambda log: log.info("applied", changes=3, sink="mirror"))
    assert text.count("\n") == 1
    entry = json.loads(text)
    assert (entry["event"], entry["changes"], entry["sink"], entry["level"]) == ("applied", 3, "mirror", "info")
    assert entry["timestamp"].endswith("Z")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_line_is_one_write(log_format: logs.Format) -> None:
    stream = Writes()
    logged(lambda log: log.info("applied", changes=3), log_format, stream=stream)
    assert [text.count("\n") for text in stream.written] == [1]


def test_tracebacks_stay_on_one_line_of_json() -> None:
    text = logged(raise_and_log)
    assert text.count("\n") == 1
    assert "Traceback" in json.loads(text)["exception"]


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_format_follows_the_terminal_unless_told(log_format: logs.Format, stream: io.StringIO, is_json: bool) -> None:
    text = logged(lambda log: log.info("hello"), log_format, stream=stream)
    assert text.startswith("{") is is_json


def test_level_is_a_threshold() -> None:
    def write(log: Any) -> None:
        log.info("too little")
        log.warning("enough")

    assert [json.loads(line)["event"] for line in logged(write, level="warning").splitlines()] == ["enough"]


def test_what_psycopg_ignores_on_the_way_to_an_error_is_not_told() -> None:
    def write(_: Any) -> None:
        logging.getLogger("psycopg").warning("error ignored terminating <psycopg.Pipeline ...>")

    assert logged(write) == ""


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize(
    "write",
    [
        lambda log: log.info(MESSAGE),
        lambda log: log.info("connecting", url=URL),
        lambda log: log.info("connecting", urls=[URL, {"deep": URL}]),
        lambda log: log.info("connecting", url=Secret(URL)),
        lambda log: log.info("connecting", conninfo="host=db password='geheim' user=me"),
        lambda log: log.info("connecting", url="mongodb+srv://me:gehe:im@geheim@cluster/"),
        lambda log: log.info("connecting", url="https://db/?api_token=geheim&x=1"),
        lambda log: log.info("failed", error=ConnectionError(URL)),
        raise_and_log,
        lambda log: logging.getLogger("uvicorn.error").error("failed: %s", URL),
    ],
)
def test_f113_secrets_are_struck_out(write: Any, log_format: logs.Format) -> None:
    text = logged(write, log_format)
    assert text
    assert "gehe" not in text


def test_the_level_changes_for_loggers_that_are_there() -> None:
    early = structlog.get_logger(
        source="shop"
    )  # as the daemon's threads have theirs; one that is bound keeps its level
    stream = io.StringIO()
    logs.configure("json", "warning", stream)
    early.info("too little")
    logs.configure("json", "debug", stream)
    early.debug("now wanted")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["now wanted"]
