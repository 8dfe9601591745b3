"""Wrong and right answers to every exercise, and what the checks must say to them.

`python -m tests.answers [04 ...]` prints the table; `test_checks.py` runs the same.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tutorial_sae.checks import core


class Answer(NamedTuple):
    """One answer to an exercise, and a fragment that the check's message must hold; None for a right answer."""

    check: Any  # the check's function
    label: str  # what this answer does, in a few words
    answers: tuple[Any, ...]  # what is handed to the check
    says: str | None


class Verdict(NamedTuple):
    answer: Answer
    number: str  # of the exercise
    message: str  # what the check printed
    as_meant: bool


def judge(answer: Answer) -> Verdict:
    """What the check says to an answer, and whether that is what it should say."""
    printed = io.StringIO()
    strict = os.environ.pop(core.STRICT, None)
    try:
        with contextlib.redirect_stdout(printed):
            answer.check(*answer.answers)
    finally:
        if strict is not None:
            os.environ[core.STRICT] = strict
    message = printed.getvalue().strip()
    number = message.removeprefix("Exercise ").split(":")[0]
    passed = f"Exercise {number}: passed" in message
    return Verdict(answer, number, message, passed if answer.says is None else not passed and answer.says in message)


def modules(names: list[str]) -> Iterator[tuple[str, Any]]:
    """(number of the notebook, its module of answers)."""
    for path in sorted(Path(__file__).parent.glob("nb[0-9][0-9].py")):
        if not names or path.stem[2:] in names:
            yield path.stem[2:], importlib.import_module(f"tests.answers.{path.stem}")


def verdicts(names: list[str]) -> Iterator[Verdict]:
    for _, module in modules(names):
        for answer in module.ANSWERS:
            yield judge(answer)
