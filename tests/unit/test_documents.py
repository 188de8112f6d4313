"""What README.md and docs/ say can be done: commands, options and links are there.

Run elsewhere: docs/migrations.md by tests/integration/test_migrations.py, the example of CONTRIBUTING.md by
tests/integration/test_contributing.py. Run by no test: `pip install .` (needs a network), `docker` and `compose` (need
an engine), `systemctl` (needs systemd), and the long runs of scripts/bench, scripts/faults and scripts/soak.
"""

from __future__ import annotations

import re
import shlex
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import typer
from typer.core import TyperGroup

import cli
from tests.documents import CHECKOUT, command_blocks

PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md", *CHECKOUT.glob("docs/*.md")]
TEXTS = {page.relative_to(CHECKOUT).as_posix(): page.read_text() for page in sorted(PAGES) if page.exists()}
COMMAND: Any = typer.main.get_command(cli.app)  # of click, or of what typer has made of it: that depends on its version
Refused: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def commands_in_blocks(page: str) -> set[str]:
    """What can be typed as it stands there."""
    return {line for line in command_blocks(CHECKOUT / page) if re.match(r"cdc(\s|$)", line)}


def commands_in_text(page: str) -> set[str]:
    """What is mentioned in passing, perhaps with places for names: `cdc copy [SINK] [--dry-run]`."""
    return {" ".join(each.split()) for each in re.findall(r"`(cdc [^`]+)`", TEXTS[page])}


def parse(line: str) -> None:
    """Parse as the command line does, and run nothing. Raises `Refused`."""
    command = COMMAND
    context = command.make_context("cdc", shlex.split(line)[1:])
    while isinstance(command, TyperGroup):
        rest = [*context._protected_args, *context.args]
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)


def unknown(text: str) -> list[str]:
    """Words of a mention that are neither commands nor options of the command line."""
    words = re.sub(r"[\[\](),]|\.\.\.", " ", text.replace("\\|", "|")).replace("/", " ").split()[1:]
    command = COMMAND
    while words and isinstance(command, TyperGroup) and not words[0].startswith("--"):
        if words[0] not in command.commands:
            return [text]
        command = command.commands[words.pop(0)]
    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    options |= {name for each in COMMAND.params for name in each.opts} | {"--help"}
    return [word for word in words if word.startswith("--") and word not in options]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_in_blocks_can_be_typed(page: str) -> None:
    for line in commands_in_blocks(page):
        try:
            parse(line)
        except Refused as exc:
            pytest.fail(f"{page}: {line}: {exc}")


@pytest.mark.parametrize("page", TEXTS)
def test_commands_in_text_are_there(page: str) -> None:
    assert {text: bad for text in commands_in_text(page) if (bad := unknown(text))} == {}


def test_a_wrong_command_is_seen() -> None:
    for line in ("cdc cut-over new", "cdc copy --all", "cdc cutover", "cdc dead-letters retire x"):
        with pytest.raises(Refused):
            parse(line)
    assert unknown("cdc copy [SINK] [--dry]") == ["--dry"]
    assert unknown("cdc dead-letters retire") == ["cdc dead-letters retire"]


def test_every_command_is_in_the_readme() -> None:
    told = {text.split()[1] for text in commands_in_text("README.md")}
    assert set(COMMAND.commands) - told == set()


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in target:
            continue
        path, _, part = target.partition("#")
        found = (CHECKOUT / page).parent / path if path else CHECKOUT / page
        assert found.exists(), f"{page}: {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), f"{page}: {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)", TEXTS["README.md"]))
    assert {page for page in TEXTS if page.startswith("docs/")} - linked == set()


def test_the_changelog_tells_of_this_version() -> None:
    from cdc import __version__  # noqa: PLC0415

    assert re.search(rf"^## \[{re.escape(__version__)}\]", TEXTS["CHANGELOG.md"], re.MULTILINE)


def test_the_picture_is_readable_in_the_light_and_in_the_dark() -> None:
    text = (CHECKOUT / "docs" / "concepts.svg").read_text()
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    assert root.find("{*}title") is not None
    assert "prefers-color-scheme: dark" in text
