"""The house rules that no tool checks: imports point one way, and everything that is code gets packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

CHECKOUT: Final = Path(__file__).parents[2]

VALUES: Final = ("cdc.change", "cdc.position", "cdc.errors")
"""What everybody may import, for they import nothing but each other."""

ONLY: Final = {
    "cdc.change": VALUES,
    "cdc.position": VALUES,
    "cdc.errors": VALUES,
    "cdc.api": (
        *VALUES,
        "cdc.__version__",
        "cdc.api",
        "cdc.status",
        "cdc.letter",
        "cdc.steering",
        "cdc.metrics",
        "cdc.choices",
        "cdc.queue",
        "cdc.config",
        "cdc.http_config",
        "cdc.secret",
        "cdc.feed",
    ),
    "sinks": (
        *VALUES,
        "sinks",
        "cdc.failpoints",
        "cdc.sink",
        "cdc.status",
        "cdc.config",
        "cdc.feed",
        "cdc.kinds",
        "cdc.postgres",
        "cdc.mongodb",
        "cdc.preflight",
    ),
}
"""Who may import only these of ours. (Of `cdc.config` they take the frozen structs of their own options.)"""

NEVER: Final = {
    "cdc": ("sinks", "cli", "cdc.postgres", "cdc.mongodb"),
    "cdc.postgres": ("sinks", "cli", "cdc.mongodb", "cdc.api"),
    "cdc.mongodb": ("sinks", "cli", "cdc.postgres", "cdc.api"),
}
"""Who may import anything of ours but these. Of several names that fit an importer the longest counts."""

MOST_LINES: Final = 400

OURS: Final = ("cdc", "sinks", "cli")


def modules() -> dict[str, Path]:
    """All modules that are shipped, by dotted name."""
    files = [CHECKOUT / "cli.py", *(CHECKOUT / "cdc").rglob("*.py"), *(CHECKOUT / "sinks").rglob("*.py")]
    return {dotted(file.relative_to(CHECKOUT)): file for file in files}


def dotted(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Names of ours that a module imports, at any depth; `from cdc import x` counts as `cdc.x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if is_in(name, OURS))


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(importer: str, source: str) -> list[str]:
    """Imports that break the rule for this importer."""
    rule = max((name for name in (*ONLY, *NEVER) if is_in(importer, (name,))), key=len, default="")
    if rule in ONLY:
        return [name for name in imports(source) if not is_in(name, (rule, *ONLY[rule]))]
    return [name for name in imports(source) if is_in(name, NEVER.get(rule, ()))]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_one_way(module: str) -> None:
    assert violations(module, modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("cdc.capture", "import sinks"),
        ("cdc.delivery", "from cdc.postgres.connection import connect"),
        ("cdc.postgres.source", "from cdc import mongodb"),
        ("cdc.api.app", "from cdc.delivery import deliver"),
        ("sinks.jsonl", "def late():\n    from cdc.queue import Queue"),
        ("cdc.change", "import cdc.config"),
    ],
)
def test_a_wrong_import_is_seen(importer: str, statement: str) -> None:
    assert violations(importer, statement)


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    graph = {
        module: {target for name in imports(file.read_text()) if (target := module_of(name, known)) != module}
        for module, file in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


def module_of(name: str, known: dict[str, Path]) -> str:
    """The module that an imported name lives in."""
    return name if name in known else name.rpartition(".")[0]


def test_every_package_folder_is_shipped() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {dotted(file.parent.relative_to(CHECKOUT)) for file in modules().values() if file.name != "cli.py"}
    assert folders == set(settings["packages"])
    assert settings["py-modules"] == ["cli"]


def test_every_file_that_is_no_module_is_shipped() -> None:
    """Patterns of `package-data` are relative to their package, and reach no further than they say."""
    patterns = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        file for package, globs in patterns.items() for glob in globs for file in package_folder(package).glob(glob)
    }
    assert {file for file in data_files() if file not in shipped} == set()


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("cdc/**/*.pyx")), ids=lambda path: path.stem)
def test_what_is_compiled_may_be_imported_first(path: Path) -> None:
    """It and its twin in Python may want each other."""
    module = ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
    pytest.importorskip(module, reason="there was no C compiler when this was installed")
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_who_uses_cryptography_loads_it() -> None:
    """It takes a tenth of the daemon's memory: signed tokens and certificates are all that need it."""
    program = "import sys, cli, cdc.daemon, cdc.web, cdc.preflight; print({'cryptography', 'jwt'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


def package_folder(package: str) -> Path:
    return CHECKOUT.joinpath(*package.split("."))


def data_files() -> Iterator[Path]:
    """What the packages hold beside modules, and what those are compiled from and to."""
    built = {".py", ".pyc", ".pyx", ".pxd", ".pyi", ".c", ".so"}
    for package in ("cdc", "sinks"):
        files = (file for file in (CHECKOUT / package).rglob("*") if file.is_file() and file.suffix not in built)
        yield from (file for file in files if file.parent.name != "__pycache__")  # a command may just be writing there


def test_no_file_is_too_long_to_be_read() -> None:
    files = [CHECKOUT / "cli.py", *CHECKOUT.glob("cdc/**/*.py"), *CHECKOUT.glob("sinks/*.py")]
    assert [file for file in files if len(file.read_text(encoding="utf-8").splitlines()) > MOST_LINES] == []
