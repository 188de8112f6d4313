"""`cdc verify`, `cutover` and `sync`: what compares a mirror with its source."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from cdc import kinds, verify_report
from cdc.change import TableName
from cdc.errors import FatalError
from cdc.resync import Wanted
from cdc.session import Session
from cdc.terminal import AnyMirror, AsJson, OneMirror, exit_unless, out, print_json

app = typer.Typer()


@app.command("verify")
def verify_command(context: typer.Context, sink: AnyMirror = None, *, as_json: AsJson = False) -> None:
    """Compare mirrors with their sources. Exit code 1 if anything differs."""
    session = context.ensure_object(Session)
    reports = {
        chosen.name: kinds.pair(chosen.kind).verify_pair(session.mirroring(chosen)) for chosen in session.mirrors(sink)
    }
    parked = {name: status.parked for name, status in session.status().sinks.items()}
    reports = {name: msgspec.structs.replace(report, parked=parked.get(name, 0)) for name, report in reports.items()}
    equal = all(report.equal for report in reports.values())
    if as_json:
        print_json(msgspec.json.encode({"equal": equal, "sinks": reports}))
    else:
        for name, report in reports.items():
            out.print(f"[bold]{name}[/bold]", verify_report.render(report), sep="\n")
    exit_unless(equal)


@app.command()
def cutover(
    context: typer.Context,
    sink: OneMirror,
    *,
    timeout: Annotated[float, typer.Option(help="Seconds that the mirror may take to catch up.")] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Prove that a mirror has everything, and make it ready to be written to. Stop your applications first.

    Exit code 1 if it is not ready.
    """
    session = context.ensure_object(Session)
    (chosen,) = session.mirrors(sink)
    session.client()  # without a daemon the mirror would never get there
    result = kinds.pair(chosen.kind).cut_over_pair(
        session.mirroring(chosen), timeout_seconds=timeout, progress=lambda line: print(line, file=sys.stderr)
    )
    if as_json:
        print_json(msgspec.json.encode(result))
    else:
        out.print(verify_report.render(result.report), *result.lines(), sep="\n", markup=False)
    exit_unless(result.ready)


@app.command()
def sync(
    context: typer.Context,
    sink: OneMirror,
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="schema.table, or database.collection, by its name at the source.")
    ],
    *,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            "--id", help="A key (of several columns: a JSON array), or an _id as Extended JSON. May be repeated."
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="An SQL condition, or a filter as Extended JSON: all that it holds for.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what differs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read given rows or documents from the source again, and put them right on the mirror.

    Exit code 1 if they are not; with --dry-run, if any was not.
    """
    session = context.ensure_object(Session)
    (chosen,) = session.mirrors(sink)
    schema, dot, name = table.partition(".")
    if not dot:
        raise FatalError(f"{table!r} has no schema (or database)", hint="for example public.orders, or ordersDB.orders")
    if not (ids or where):
        raise FatalError(
            "it is not said what to sync", hint="cdc sync SINK SCHEMA.TABLE --id KEY, or --where CONDITION"
        )
    wanted = Wanted(tuple(ids or ()), where)
    with session.alone_or_beside_daemon():
        mirroring = session.mirroring(chosen)
        report = kinds.pair(chosen.kind).resync_pair(mirroring, TableName(schema, name), wanted, dry_run=dry_run)
    if as_json:
        print_json(msgspec.json.encode(report))
    else:
        out.print(*report.lines(), sep="\n", markup=False, soft_wrap=True)
    exit_unless(report.settled)
