"""The line budget: `python .ci/count_lines.py` prints the counts and fails above a limit.

A line is a physical line, blank lines, comments and docstrings included, so there is nothing to argue about.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """One budget: what it covers, lines counted, lines allowed."""

    name: str
    lines: int
    limit: int


def count(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def budget(package: Path) -> list[Part]:
    """The three budgets of the package in this folder."""
    python = sorted(package.rglob("*.py"))
    checks = [file for file in python if file.relative_to(package).parts[0] == "checks"]
    rest = [file for file in python if file not in set(checks)]
    script = sorted(file for file in package.rglob("*") if file.suffix in {".js", ".mjs", ".ts"})
    return [
        Part("Python without checks/", count(rest), 3500),
        Part("Python in checks/", count(checks), 1500),
        Part("JavaScript", count(script), 600),
    ]


def main(package: Path = ROOT / "tutorial_sae") -> int:
    if not any(package.rglob("*.py")):
        print(f"no Python files in {package.name}/: nothing to count, which cannot be right")
        return 1
    over = False
    for part in budget(package):
        too_many = part.lines > part.limit
        over |= too_many
        mark = f"  <- {part.lines - part.limit} too many" if too_many else ""
        print(f"{part.name:<24}{part.lines:>6} of {part.limit}{mark}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
