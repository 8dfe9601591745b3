"""The checks are themselves tested: what `tests/answers` holds right or wrong is judged so, and in the words meant.

`python -m tests.answers` prints the same as a table.
"""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.answers import Answer, judge, modules
from tutorial_sae.checks import core

CHECKS = Path(core.HERE)
LESSONS = sorted(path.stem[2:] for path in CHECKS.glob("nb[0-9][0-9].py"))
ANSWERS = dict(modules([]))
CORE_AT_LEAST = {"00": 1, "01": 4, "02": 4, "03": 3, "04": 4, "05": 4, "06": 4, "07": 3, "08": 3, "09": 2}


@cache
def number_of(check: Any) -> str:
    """The number of a check's exercise, as it says it itself."""
    return judge(Answer(check, "", (None,), None)).number


@cache
def exercises(lesson: str) -> dict[str, core.Exercise]:
    """The exercises of a lesson by number, in the order in which they are defined."""
    importlib.import_module(f"tutorial_sae.checks.nb{lesson}")
    return {n: e for n, e in core.REGISTERED.items() if n.split(".")[0] == str(int(lesson))}


def answers(number: str) -> list[Answer]:
    """The answers to one exercise."""
    lesson = f"{int(number.split('.')[0]):02d}"
    return [a for a in getattr(ANSWERS.get(lesson), "ANSWERS", []) if number_of(a.check) == number]


def all_answers() -> Iterator[Any]:
    for module in ANSWERS.values():
        for answer in module.ANSWERS:
            sort = "right" if answer.says is None else "wrong"
            yield pytest.param(answer, id=f"{number_of(answer.check)}-{sort}-{answer.label}")


NUMBERS = [number for lesson in LESSONS for number in exercises(lesson)]


@pytest.mark.parametrize("answer", all_answers())
def test_each_answer_is_judged_as_meant(answer: Answer):
    verdict = judge(answer)
    assert verdict.as_meant, f"wanted: {answer.says or 'passed'}\nsaid: {verdict.message}"
    assert verdict.number == number_of(answer.check)
    verdicts = (
        "passed \\(.+\\)\\. \\d+ of \\d+ in this notebook\\."
        if answer.says is None
        else "not (attempted )?yet\\. .{10}"
    )
    assert re.match(f"Exercise {verdict.number}: {verdicts}", verdict.message, re.DOTALL), verdict.message
    assert "Traceback" not in verdict.message
    assert len(verdict.message) < 3_000


def test_every_lesson_has_answers_and_no_answer_is_of_another():
    assert set(ANSWERS) == set(LESSONS)
    for lesson, module in ANSWERS.items():
        assert {number_of(answer.check) for answer in module.ANSWERS} == set(exercises(lesson))


@pytest.mark.parametrize("lesson", LESSONS)
def test_exercises_are_numbered_in_order(lesson: str):
    mine = list(exercises(lesson).values())
    assert {e.number for e in mine} == {f"{int(lesson)}.{i + 1}" for i in range(len(mine))}
    assert len({e.title for e in mine}) == len(mine)
    assert sum(e.core for e in mine) >= CORE_AT_LEAST[lesson]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_exercise_is_attacked(number: str):
    """Code: four plausible wrong answers and two right ones; a letter or a number: two wrong and one right."""
    mine = answers(number)
    code = any(callable(part) for answer in mine for part in answer.answers)
    wrong, right = ([a for a in mine if (a.says is None) == is_right] for is_right in (False, True))
    assert len({a.says for a in wrong}) >= (3 if code else 1), "wrong answers are told apart"
    assert len(wrong) >= (4 if code else 2), [a.label for a in wrong]
    assert len(right) >= (2 if code else 1), [a.label for a in right]
    assert len({a.label for a in mine}) == len(mine)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_wrong_letter_is_refused_with_a_sentence_of_its_own(number: str):
    mine = answers(number)
    if not all(len(a.answers) == 1 and isinstance(a.answers[0], str) for a in mine):
        return  # no question with letters, or a part of an exercise that takes code as well
    said = {}
    for letter in string.ascii_lowercase[:8]:
        verdict = judge(Answer(mine[0].check, letter, (letter,), None))
        if "is none of the letters" not in verdict.message:
            said[letter] = verdict
    refused = {letter: verdict.message for letter, verdict in said.items() if not verdict.as_meant}
    assert len(refused) >= 2
    assert len(said) == len(refused) + 1, "one letter is right"
    assert len(set(refused.values())) == len(refused)
    assert {a.answers[0].strip("() ").lower() for a in mine if a.says is not None} >= set(refused)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("untouched", [None, ..., ""])
def test_an_untouched_answer_is_no_attempt(number: str, untouched: Any):
    for a in answers(number):
        verdict = judge(Answer(a.check, "", (untouched,) * len(a.answers), None))
        assert verdict.message.startswith(f"Exercise {number}: not attempted yet")


def test_checks_never_import_a_solution():
    for file in CHECKS.glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) +(?:solutions|tests)\b", file.read_text("utf-8"), re.MULTILINE), file


def test_the_first_five_lessons_have_sixteen_core_exercises_of_five_kinds():
    first = ["00", "01", "02", "03", "04"]
    assert LESSONS[:5] == first
    core_ones = [e for lesson in first for e in exercises(lesson).values() if e.core]
    assert len(core_ones) >= 16
    assert len({e.kind for e in core_ones}) >= 5, {e.kind for e in core_ones}
