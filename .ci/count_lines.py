"""The line budget: `python .ci/count_lines.py` prints the counts and fails above a limit.

For Python a line counts if code stands on it. Blank lines, comments and docstrings do not: a budget must not make it
cheap to leave an explanation out. For JavaScript every line counts.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """One budget: what it covers, lines counted, lines allowed."""

    name: str
    lines: int
    limit: int


SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source: str) -> int:
    """Lines of Python on which code stands."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def count(files: list[Path]) -> int:
    texts = [(file, file.read_text(encoding="utf-8")) for file in files]
    return sum(code_lines(text) if file.suffix == ".py" else len(text.splitlines()) for file, text in texts)


def budget(package: Path) -> list[Part]:
    """The three budgets of the package in this folder."""
    python = sorted(package.rglob("*.py"))
    checks = [file for file in python if file.relative_to(package).parts[0] == "checks"]
    rest = [file for file in python if file not in set(checks)]
    script = sorted(file for file in package.rglob("*") if file.suffix in {".js", ".mjs", ".ts"})
    return [
        # 3500 without full training: recipes and plans, streams that resume, many ranks, SAELens (some 700 lines)
        Part("Python without checks/", count(rest), 4300),
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
