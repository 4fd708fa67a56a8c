"""What `make mutants` changes, and how it judges; whether the program's tests kill its mutants, it says itself."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import mutants
import mutations
import program
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unmeasured


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("x = a < 1", ["drop it", "lt is lte", "1 + 1"]),
        ("x = a is b and not c", ["drop it", "and is or", "is is isnot", "drop not"]),
        ("x = min(a, b)", ["drop it", "min() is a", "min() is b"]),
        ("x = 'a' + b", ["drop it", "text 'a'"]),
        ("x = f'{a}b'", ["drop it"]),
        ("x = a if b else c", ["drop it", "always the first", "always the second"]),
        ("if a: b()", ["condition is True", "condition is False", "drop it"]),
        ("if TYPE_CHECKING: import a", []),
        ("while a: break", ["condition is False", "continue", "drop it"]),
        ("def f(a: int = 1) -> int: return a", ["1 + 1", "return None"]),
        ("def f() -> bool: return False", ["False is True"]),
        ("'says what it is for'", []),
        ("import a", []),
    ],
)
def test_each_small_change_of_meaning_is_made(line: str, changes: list[str]) -> None:
    made = list(mutations.mutants("some", line))

    assert [mutant.key for mutant in made] == [f"some: {line} | {change}" for change in changes]
    assert len({mutant.source for mutant in made} | {line}) == len(changes) + 1


def test_the_same_change_of_the_same_line_is_numbered() -> None:
    first, second = (
        mutant for mutant in mutations.mutants("some", "f(1)\n\nf(1)\n") if mutant.key.count("1 + 1")
    )

    assert (first.key, first.line, first.source) == ("some: f(1) | 1 + 1", 1, "f(2)\nf(1)")
    assert (second.key, second.line, second.source) == ("some: f(1) | 1 + 1 #2", 3, "f(1)\nf(2)")


def test_survivors_have_reasons() -> None:
    text = "# a comment\na: x | y\nb: z | drop it\n    equivalent: it is\n    the same\n\nc: z | 0 + 1\n    nobody cares\n"

    assert mutants.known(text) == {
        "a: x | y": "equivalent: it is the same",
        "b: z | drop it": "equivalent: it is the same",
        "c: z | 0 + 1": "nobody cares",
    }
    assert mutants.known(mutants.SURVIVORS.read_text())
    assert all(mutants.known(mutants.SURVIVORS.read_text()).values())


@pytest.mark.timeout(600)
def test_the_listed_have_to_be_alive_and_the_dead_not_listed(folder: Path) -> None:
    """On one line of a real module, whose mutants all die."""
    survivors = folder / "survivors.txt"
    line = "stopping: self._is_set = True"
    survivors.write_text(f"{line} | drop it\n{line} | no such change\n    equivalent\n")
    command = [sys.executable, mutants.__file__, "--survivors", str(survivors), "--containing", line]

    done = subprocess.run(
        [*command, "--workers", "1", "stopping"],
        capture_output=True,
        check=False,
        cwd=program.ROOT,
        text=True,
    )

    assert (done.returncode, done.stderr) == (1, "")
    assert f"listed in survivors.txt, but dead: {line} | drop it\n" in done.stdout
    assert f"listed in survivors.txt, but no mutant any more: {line} | no such change\n" in done.stdout
    assert "100.0% of those that are not equivalent are dead; 2 surprises\n" in done.stdout
