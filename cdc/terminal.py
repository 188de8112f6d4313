"""What the commands have in common: their arguments, and how they print and end."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.console import Console

OneMirror = Annotated[str, typer.Argument(metavar="SINK", help="A mirror.")]
AnyMirror = Annotated[str | None, typer.Argument(metavar="SINK", help="A mirror; all of them, if left out.")]
AnySink = Annotated[str | None, typer.Argument(metavar="SINK", help="All sinks, if left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

out: Final = Console()


def print_json(data: bytes) -> None:
    """The one line that `--json` promises."""
    print(data.decode())


def exit_unless(fine: bool) -> None:
    """End with exit code 1 where something is not as it should be."""
    if not fine:
        raise typer.Exit(1)
