"""What documents hold that can be tried: blocks of code."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).parents[1]


def code_block(page: Path, language: str) -> str:
    """The first block in that language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page.name} has no block of {language}"
    return found[1]


def command_blocks(page: Path) -> Iterator[str]:
    """Lines of all blocks that are indented, or fenced without a language; without comments at their ends."""
    text = page.read_text()
    fenced = re.findall(r"^```(?:sh|console)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    for block in (*fenced, *indented):
        yield from (line.strip().removeprefix("$ ").partition(" # ")[0].strip() for line in block.splitlines())


def example_sink(folder: Path) -> Path:
    """The sink of CONTRIBUTING.md, in a file of its kind's name."""
    path = folder / "jsonl.py"
    path.write_text(code_block(CHECKOUT / "CONTRIBUTING.md", "python"))
    return path


def module_at(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = module_from_spec(spec)  # where annotations are looked up
    spec.loader.exec_module(module)
    return module
