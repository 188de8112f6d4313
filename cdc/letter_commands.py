"""`cdc dead-letters ...`: see, retry, discard and export what a target refuses."""

from __future__ import annotations

import os
import pwd
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import msgspec
import typer

from cdc import letter_table
from cdc.errors import FatalError
from cdc.letter import MAX_PAGE, DeadLetters, Letter, LetterId, LetterQuery, Outcome, Outcomes
from cdc.session import Session
from cdc.terminal import AnySink, AsJson, exit_unless, out, print_json

app = typer.Typer(help="See, retry, discard and export changes that a target refuses.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="Such as mirror:1207.3, from the list.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Such as mirror:1207.3, from the list.")]

_BAD: Final = frozenset({"refused", "unknown", "unsettled"})


@app.command("list")
def list_command(
    context: typer.Context,
    sink: AnySink = None,
    *,
    dead: Annotated[bool, typer.Option("--dead", help="Only those that are no longer tried by themselves.")] = False,
    as_json: AsJson = False,
) -> None:
    """List parked changes: refused ones, and those that wait behind them."""
    session = context.ensure_object(Session)
    session.sinks(sink)
    query = LetterQuery(sink=sink or "", state=("dead",) if dead else msgspec.UNSET, limit=MAX_PAGE)
    found = list(_all(session.dead_letters(), query))
    if as_json:
        print_json(msgspec.json.encode(found))
    else:
        out.print(letter_table.render(found), soft_wrap=True)


@app.command()
def show(context: typer.Context, letter: Id, *, as_json: AsJson = False) -> None:
    """Show one parked change with all that it holds."""
    found = context.ensure_object(Session).dead_letters().get(LetterId.parse(letter))
    if as_json:
        print_json(msgspec.json.encode(found))
    else:
        print(*letter_table.lines(found), sep="\n")


@app.command()
def retry(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Such as mirror:1207.3, from the list; or, with --all, a sink."),
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All that do not wait behind another one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try parked changes now, as if they had never been tried. Those behind them follow, in order.

    What was refused because a parked row still has a unique value that it wants is tried by itself: see --all.
    """
    given = names or []
    if len(given) > 1 if every else not given:
        raise FatalError(
            "it is not said what to try again", hint="name ids of `cdc dead-letters list`, or --all [SINK]"
        )
    session = context.ensure_object(Session)
    sink = given[0] if every and given else None
    session.sinks(sink)
    wanted = None if every else [LetterId.parse(each) for each in given]
    with session.changing_dead_letters() as letters:
        outcomes = letters.retry(wanted, _user(), sink=sink or "")
    _tell(outcomes, as_json=as_json)


@app.command()
def discard(
    context: typer.Context,
    ids: Ids = None,
    *,
    reason: Annotated[str, typer.Option(help="Why: it is logged, with who you are.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give parked changes up for good. Those behind them are applied without them."""
    wanted = [LetterId.parse(each) for each in ids or ()]
    if not wanted or not reason.strip():
        raise FatalError("it is not said what to discard, and why", hint="cdc dead-letters discard ID --reason TEXT")
    if not yes:
        names = ", ".join(map(str, wanted[:5])) + (f" and {len(wanted) - 5} more" if len(wanted) > 5 else "")
        typer.confirm(f"Discard {names}? The target will never get them.", abort=True, err=True)
    with context.ensure_object(Session).changing_dead_letters() as letters:
        outcomes = letters.discard(wanted, reason=reason.strip(), who=_user())
    _tell(outcomes, as_json=as_json)


@app.command()
def export(
    context: typer.Context,
    sink: AnySink = None,
    *,
    output: Annotated[Path | None, typer.Option(help="A new file, instead of standard output.")] = None,
) -> None:
    """Write parked changes with all that they hold, each as a line of JSON. They stay parked."""
    session = context.ensure_object(Session)
    session.sinks(sink)
    letters = _all(session.dead_letters(), LetterQuery(sink=sink or "", limit=MAX_PAGE, full=True))
    if output is None:
        for letter in letters:
            print_json(msgspec.json.encode(letter))
        return
    with _created(output) as file:
        count = 0
        for count, letter in enumerate(letters, 1):  # noqa: B007 - the last one is told
            file.write(msgspec.json.encode(letter) + b"\n")
    print(f"{count:,} changes written to {output}")


def _all(letters: DeadLetters, query: LetterQuery) -> Iterator[Letter]:
    """Page by page."""
    while True:
        page = letters.list(query)
        yield from page.letters
        if not page.has_more:
            return
        query = msgspec.structs.replace(query, after=page.letters[-1].id)


def _created(path: Path) -> BinaryIO:
    """A new file that nobody else may read: it will hold rows."""
    try:
        return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))
    except OSError as exc:
        raise FatalError(f"{path}: {exc.strerror}", hint="name a file that is not there yet") from exc


def _tell(outcomes: Collection[Outcome], *, as_json: bool) -> None:
    """Exit code 1 where something was not done."""
    if as_json:
        print_json(msgspec.json.encode(Outcomes(tuple(outcomes))))
    elif not outcomes:
        print("nothing is parked")
    else:
        for each in outcomes:
            print(f"{each.id}  {each.fate}{f': {each.reason}' if each.reason else ''}")
    exit_unless(not any(each.fate in _BAD for each in outcomes))


def _user() -> str:
    """Who is at the terminal, as the system knows them."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
