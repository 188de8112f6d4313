"""The catalogue of failures and its tests belong together, and a script says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SCRIPT = CHECKOUT / "scripts" / "coverage-of-failures"

CATALOGUE = """
- **F1** A row, which a test names by its own name.
- **F2** What nothing proves.
- **F30** A row,
  which a docstring names.
- **F31** A row that a comment names.
- **F32** Another one that nothing proves.
"""

LIMITS = """
- **F2**, **F32** They are not built. F1 is.
- **F30 now and then.** It is not proven for all.
- **Others.** F31 has no limit.
"""

TESTS = '''
def test_f1_something(): ...

class TestSomething:
    def test_else(self):
        """Proves F30."""
        assert True  # and F31

def test_b2f_and_f2e_are_no_rows():
    """Neither is BF2."""
'''


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments, str(checkout)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "docs" / "failures.md").write_text(CATALOGUE)
    (tmp_path / "docs" / "limits.md").write_text(LIMITS)
    (tmp_path / "tests" / "unit" / "test_it.py").write_text(TESTS)
    return tmp_path


def test_every_row_has_a_test_or_a_limit() -> None:
    done = run(CHECKOUT, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_catalogue_is_complete() -> None:
    table = run(CHECKOUT).stdout.split()
    assert [word for word in table if word.startswith("F")] == [f"F{number}" for number in range(1, 121)]


def test_rows_are_shown_with_their_tests(checkout: Path) -> None:
    done = run(checkout)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["F1", "tests/unit/test_it.py::test_f1_something"],
        ["F2", "docs/limits.md"],
        ["F30", "tests/unit/test_it.py::test_else"],
        ["docs/limits.md"],
        ["F31", "tests/unit/test_it.py::test_else"],
        ["F32", "docs/limits.md"],
    ]


@pytest.mark.parametrize(
    ("file", "there", "instead", "complaint"),
    [
        ("tests/unit/test_it.py", "# and F31", "", "F31 has no test, and does not stand in docs/limits.md"),
        ("docs/limits.md", ", **F32**", "", "F32 has no test, and does not stand in docs/limits.md"),
        ("docs/limits.md", "**F30 now", "**F98 now", "F98 is no row of the catalogue: docs/limits.md"),
        ("tests/unit/test_it.py", "test_f1_", "test_f1_f99_",
         "F99 is no row of the catalogue: tests/unit/test_it.py::test_f1_f99_something"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(checkout: Path, file: str, there: str, instead: str, complaint: str) -> None:
    path = checkout / file
    path.write_text(path.read_text().replace(there, instead))
    done = run(checkout)
    assert (done.returncode, done.stderr.strip()) == (1, complaint)


def test_a_catalogue_that_cannot_be_read_is_an_error(checkout: Path) -> None:
    (checkout / "docs" / "failures.md").write_text(CATALOGUE + "- **F1** Again.\n")
    assert "F1 is there twice" in run(checkout).stderr
    (checkout / "docs" / "failures.md").write_text("")
    assert run(checkout).returncode == 1
