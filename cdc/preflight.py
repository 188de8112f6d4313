"""What a check found out, and how it is shown: the frame that each kind of database fills with checks of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Final, Literal

import msgspec
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from cdc.api.certificate import read_certificate
from cdc.api.listener import listen
from cdc.change import TableName
from cdc.config import Config, SourceConfig
from cdc.directory import listens_at
from cdc.errors import CdcError, FatalError

Level = Literal["ok", "warning", "error"]

_MARKS: Final = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was checked.

    subject: what it is about, in the words of the database: a table, a setting, a slot.
    fix: what to do about it: a statement, a setting, or a sentence. Empty where nothing is wrong.
    """

    level: Level
    subject: str
    message: str
    fix: str = ""


class Section(msgspec.Struct, frozen=True):
    """All findings about one source, one sink or the daemon itself."""

    title: str
    findings: tuple[Finding, ...]


def collect(title: str, check: Iterable[Finding]) -> Section:
    """Run a check. An error that ends it, such as a refused connection, becomes its last finding."""
    return Section(title, tuple(guard("check", check)))


def guard(subject: str, check: Iterable[Finding]) -> Iterator[Finding]:
    """Turn the error that ends a check into a finding, so that others can go on."""
    try:
        yield from check
    except CdcError as exc:
        yield Finding("error", subject, str(exc), exc.hint)


def failed(sections: Iterable[Section]) -> bool:
    """Whether anything found would keep the daemon from doing its work."""
    return any(finding.level == "error" for section in sections for finding in section.findings)


def require(findings: Iterable[Finding]) -> None:
    """Raise `FatalError` for the first error among the findings; the number of the others is in its message."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        first, more = errors[0], len(errors) - 1
        rest = f" (and {more} more: `cdc check` lists them)" if more else ""
        raise FatalError(f"{first.subject}: {first.message}{rest}", hint=first.fix)


def render(sections: Iterable[Section]) -> Group:
    """Lay out for a terminal: a line for each finding, its fix below it."""
    return Group(*(part for section in sections for part in _render_section(section)))


def as_json(sections: Iterable[Section]) -> bytes:
    """The same for machines: `{"ok": bool, "sections": [{"title", "findings": [...]}]}`."""
    listed = list(sections)
    return msgspec.json.encode({"ok": not failed(listed), "sections": listed})


def check_data_dir(config: Config) -> Iterator[Finding]:
    """Whether the queues can be written where they shall be, and how far the disk reaches. Creates nothing."""
    wanted = Path(config.daemon.data_dir)
    existing = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "error", "data_dir", f"{existing} is not a folder that this user may write to", _made_ours(wanted, existing)
        )
        return
    free, floor = shutil.disk_usage(existing).free, config.queue.min_free_bytes
    room = f"{wanted}: {_gigabytes(free)} free"
    if free <= floor:
        reserve = f"{room}, not more than queue.min_free_bytes ({_gigabytes(floor)}): nothing would be captured"
        yield Finding("error", "data_dir", reserve, "free some space, or move daemon.data_dir to a larger disk")
    elif free < (full := floor + config.queue.max_bytes * len(config.sources)):
        need = f"{room}; queues at their bound (queue.max_bytes) and the reserve need {_gigabytes(full)}"
        yield Finding("warning", "data_dir", need, "lower queue.max_bytes, or move daemon.data_dir to a larger disk")
    else:
        yield Finding("ok", "data_dir", room)


def check_address(config: Config) -> Iterator[Finding]:
    """Whether the daemon can listen, or does so already. Raises `FatalError` where another program has its address."""
    host, port = config.http.host_and_port
    if listens_at(Path(config.daemon.data_dir), port):
        yield Finding("ok", "http", f"the daemon listens on {host}:{port}")
        return
    listen((host, port)).close()
    yield Finding("ok", "http", f"{host}:{port} is free to listen on")


def check_globs(subject: str, source: SourceConfig, captured: Sequence[TableName]) -> Iterator[Finding]:
    """Whether every include finds something: one that finds nothing is mostly mistyped. captured: there is one."""
    idle, count = source.tables.idle(captured), f"{len(captured)} captured"
    if not idle:
        yield Finding("ok", subject, count)
        return
    fix = f"correct sources.{source.name}.tables.include, unless they are yet to be made"
    yield Finding("warning", subject, f"{count}, of which none matches {', '.join(idle)}", fix)


def _made_ours(wanted: Path, existing: Path) -> str:
    """What to do about a folder that cannot be written. existing: as much of its path as there is."""
    if not existing.is_dir():
        return "set daemon.data_dir to another folder"
    command = "chown -R" if existing == wanted else "install -d -o"  # its parents are not to be ours
    return f"as root: {command} {os.geteuid()} {quote(str(wanted.absolute()))}"


def check_certificate(config: Config) -> Iterator[Finding]:
    """Whether HTTPS can be had with what is configured, and until when."""
    certificate = read_certificate(config.http)
    if certificate is None:
        return
    if certificate.problem:
        yield Finding("warning", "certificate", certificate.problem, "renew it; then `systemctl reload cdc`, or SIGHUP")
    else:
        yield Finding("ok", "certificate", f"valid until {certificate.not_after:%Y-%m-%d %H:%M} UTC")


def _render_section(section: Section) -> Iterator[Text | Padding]:
    yield Text(section.title, style="bold")
    for finding in section.findings:
        mark, color = _MARKS[finding.level]
        yield Padding(Text.assemble((mark, color), f" {finding.subject}: {finding.message}"), (0, 0, 0, 2))
        if finding.fix:
            yield Padding(Text(finding.fix, style="cyan"), (0, 0, 0, 6))


def _gigabytes(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB"
