"""What the commands have in common: their arguments, and how they print and end."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer
from rich.console import Console
from typer.core import TyperGroup

OneMirror = Annotated[str, typer.Argument(metavar="SINK", help="A mirror.")]
AnyMirror = Annotated[str | None, typer.Argument(metavar="SINK", help="A mirror; all of them, if left out.")]
AnySink = Annotated[str | None, typer.Argument(metavar="SINK", help="All sinks, if left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

out: Final = Console()


class Commands(TyperGroup):
    """All commands. Told by one that it has no such option, a person learns which of them go before the command."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command of a context."""
        try:
            return super().invoke(ctx)
        except Exception as exc:
            # the class is typer's or click's, by version; both keep the option, and the context of the command
            option = getattr(exc, "option_name", None)
            own = next((each for each in self.params if option in each.opts), None)
            command: Any = getattr(exc, "ctx", None)
            if own is not None and command is not None:
                value = "" if getattr(own, "is_flag", False) else " ..."
                _, _, path = command.command_path.partition(" ")
                exc.message = f"{option} goes before the command: cdc {option}{value} {path}"  # type: ignore[attr-defined]
            raise


def print_json(data: bytes) -> None:
    """The one line that `--json` promises."""
    print(data.decode())


def exit_unless(fine: bool) -> None:
    """End with exit code 1 where something is not as it should be."""
    if not fine:
        raise typer.Exit(1)
