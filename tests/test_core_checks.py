"""The machinery of checks/core.py, on exercises that exist in these tests only."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tutorial_sae.checks import core
from tutorial_sae.checks.core import Case, Failed, call, choose, close, exercise, like, measure, progress, try_cases


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No exercise but the test's own, no strictness, no record; and what a check must leave alone is as it was."""
    monkeypatch.setattr(core, "REGISTERED", {})
    monkeypatch.delenv(core.STRICT, raising=False)
    monkeypatch.delenv(core.RECORD, raising=False)
    torch.manual_seed(3)
    state, handler, stdout = torch.random.get_rng_state(), signal.getsignal(signal.SIGALRM), sys.stdout
    yield
    assert torch.equal(torch.random.get_rng_state(), state), "a check leaves the random numbers alone"
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert sys.stdout is stdout


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def double(x: Tensor) -> Tensor:
    return 2 * x


def square(x: Tensor) -> Tensor:
    return x * x


@exercise("99.1", "double", seconds=3)
def check_double(f: Any) -> str:
    x = X.clone()
    said = try_cases(f, double, [Case("two rows", (x,))], {"You square: twice is meant.": square})
    assert torch.equal(x, X), "the input of a check is as it was"
    return said


core.REGISTERED.pop("99.1")  # of the tests, and no part of the course


def said_to(f: Any, capsys: pytest.CaptureFixture[str], check: Callable[..., None] = check_double) -> str:
    """What the check prints; it may never raise."""
    try:
        check(f)
    except Failed:  # raised by an assertion of the check itself
        pytest.fail("a check must not raise")
    text = capsys.readouterr().out
    assert "Traceback" not in text
    assert text.startswith("Exercise ")
    return text


def test_a_right_answer_passes(capsys: pytest.CaptureFixture[str]):
    core.REGISTERED["99.1"] = core.Exercise("99.1", "double", "implement", True, core.PASSED)
    assert said_to(double, capsys) == "Exercise 99.1: passed (two rows). 1 of 1 in this notebook.\n"


# -- untouched ------------------------------------------------------------------------------------------


def stub(x: Tensor) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("answer", [stub, None, ..., "", "  "])
def test_an_untouched_stub_is_not_an_attempt(answer: Any, capsys: pytest.CaptureFixture[str]):
    assert "not attempted yet" in said_to(answer, capsys)


def test_an_error_of_pytorch_is_not_taken_for_the_stub(capsys: pytest.CaptureFixture[str]):
    def unsupported(x: Tensor) -> Tensor:
        return x.to("meta").to("cpu")

    def with_message(x: Tensor) -> Tensor:
        raise NotImplementedError("not for sparse tensors")

    for answer in (unsupported, with_message):
        text = said_to(answer, capsys)
        assert "not yet. Your code raised NotImplementedError: " in text


# -- code that misbehaves -------------------------------------------------------------------------------


def loops(x: Tensor) -> Tensor:
    while True:
        pass


def loops_and_swallows(x: Tensor) -> Tensor:
    while True:
        with contextlib.suppress(Exception):  # a `try` with `except Exception: pass`
            math.sqrt(2)


def sleeps(x: Tensor) -> Tensor:
    time.sleep(60)
    return x


@pytest.mark.parametrize("answer", [loops, loops_and_swallows, sleeps])
def test_an_endless_loop_is_stopped(answer: Any, capsys: pytest.CaptureFixture[str]):
    start = time.monotonic()
    assert "stopped after 3 seconds: is there a loop that never ends?" in said_to(answer, capsys)
    assert time.monotonic() - start < 20


def test_an_alarm_that_is_swallowed_once_comes_again(capsys: pytest.CaptureFixture[str]):
    def swallows(x: Tensor) -> Tensor:
        for _ in range(2):
            with contextlib.suppress(BaseException):
                loops(x)
        return x

    start = time.monotonic()
    said_to(swallows, capsys)
    assert time.monotonic() - start < 20


def test_an_endless_generator_that_the_check_lists_is_stopped(capsys: pytest.CaptureFixture[str]):
    @exercise("99.2", "three numbers", seconds=3)
    def check(f: Any) -> str:
        for number in call(f):
            assert number >= 0
        return "numbers"

    assert "stopped after 3 seconds" in said_to(itertools.count, capsys, check)


def test_a_flood_of_output_is_cut(capsys: pytest.CaptureFixture[str]):
    def prints(x: Tensor) -> Tensor:
        for _ in range(50):
            print("z" * 100_000)
        return 2 * x

    text = said_to(prints, capsys)
    assert text.startswith("Exercise 99.1: passed (two rows).")
    assert "Your code printed (the first 2,000 of 5,000,050 characters):\nzzz" in text
    assert len(text) < 2_500


def test_a_little_output_is_shown_whole(capsys: pytest.CaptureFixture[str]):
    text = said_to(lambda x: (print("here", x.shape), 2 * x)[1], capsys)
    assert "Your code printed:\nhere torch.Size([2, 2])\n" in text


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (3, "A function was wanted, and this is a int"),
        (X, "A function was wanted, and this is a tensor of shape (2, 2)"),
        ("double", "A function was wanted, and this is a str"),
        (lambda x: None, "must be a tensor of shape (2, 2), and is None (is a `return` missing?)."),
        (lambda x: [[2, 4], [6, 8]], "must be a tensor of shape (2, 2), and is a list."),
        (lambda x: 2 * x.numpy(), "must be a tensor of shape (2, 2), and is a ndarray."),
        (lambda x: 2 * x[0], "has shape (2,), and (2, 2) was wanted."),
        (lambda x: (2 * x).long(), "has dtype torch.int64, and torch.float32 was wanted."),
        (lambda x: x > 0, "has dtype torch.bool, and torch.float32 was wanted."),
        (lambda x: x * math.nan, "holds NaN: a division of 0 by 0, perhaps?"),
        (lambda: X, "Your code raised TypeError: "),
        (lambda x: x @ torch.ones(3), "Your code raised RuntimeError: "),
    ],
)
def test_wrong_types_are_told_in_words(answer: Any, says: str, capsys: pytest.CaptureFixture[str]):
    text = said_to(answer, capsys)
    assert text.startswith("Exercise 99.1: not yet. ")
    assert says in text


def in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def resizes(x: Tensor) -> Tensor:
    x.resize_(3, 2)
    return x


@pytest.mark.parametrize("answer", [in_place, resizes])
def test_an_input_that_is_changed_is_named_and_restored(answer: Any):
    x = X.clone()
    with pytest.raises(Failed, match="changes the tensor that it is given"):
        call(answer, x)
    assert torch.equal(x, X)


def test_an_input_with_nan_or_gradients_counts_as_unchanged():
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    assert torch.equal(call(lambda x: x[1], x), x[1])
    with pytest.raises(Failed, match="changes the tensor"):
        call(lambda x: x.data.mul_(2), x)
    assert x.tolist()[1] == 1.0


def test_an_input_given_by_keyword_is_watched_too():
    with pytest.raises(Failed, match="changes the tensor"):
        call(lambda x: x.zero_(), x=X.clone())


def test_an_error_names_the_line_of_the_learners_code(capsys: pytest.CaptureFixture[str]):
    def helper(x: Tensor) -> Tensor:
        return x / len([][0])  # the line

    text = said_to(lambda x: helper(x), capsys)
    assert "Your code raised IndexError: list index out of range" in text
    assert "of your cell: return x / len([][0])  # the line" in text


def test_a_long_or_empty_error_is_cut_or_said(capsys: pytest.CaptureFixture[str]):
    def long(x: Tensor) -> Tensor:
        raise ValueError("a" * 10_000 + "\n" * 100)

    def empty(x: Tensor) -> Tensor:
        raise KeyError

    assert len(said_to(long, capsys)) < 600
    assert "raised KeyError: (no message)" in said_to(empty, capsys)


def test_an_answer_does_not_end_the_notebook(capsys: pytest.CaptureFixture[str]):
    assert "raised SystemExit: 3" in said_to(lambda x: sys.exit(3), capsys)


def test_ctrl_c_does(capsys: pytest.CaptureFixture[str]):
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_double(interrupted)


def test_a_recursion_without_end_is_an_error_like_others(capsys: pytest.CaptureFixture[str]):
    def again(x: Tensor) -> Tensor:
        return again(x)

    assert "raised RecursionError" in said_to(again, capsys)


def test_gradients_switched_off_are_named_and_switched_on_again(capsys: pytest.CaptureFixture[str]):
    def off(x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return 2 * x

    def off_and_raises(x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        raise ValueError("and then this")

    assert "switches gradients off" in said_to(off, capsys)
    assert "raised ValueError: and then this" in said_to(off_and_raises, capsys)
    assert torch.is_grad_enabled()  # and `clean` looks again


def test_an_answer_that_seeds_does_not_reach_outside(capsys: pytest.CaptureFixture[str]):
    def seeds(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return 2 * x + 0 * torch.rand(2)

    assert "passed" in said_to(seeds, capsys)  # and `clean` compares the state


# -- outcomes -------------------------------------------------------------------------------------------


def test_strict_mode_raises_for_all_that_is_not_passed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(core.STRICT, "1")
    check_double(double)
    for answer, says in ((stub, "not attempted yet"), (square, "You square"), (loops, "stopped")):
        with pytest.raises(AssertionError, match=says):
            check_double(answer)


def test_each_try_adds_a_line_to_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record = tmp_path / "record"
    monkeypatch.setenv(core.RECORD, str(record))
    for answer in (stub, square, double):
        check_double(answer)
    monkeypatch.setenv(core.STRICT, "1")
    with pytest.raises(AssertionError):
        check_double(square)
    lines = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    assert [line[:2] for line in lines] == [["99.1", o] for o in (core.OPEN, core.FAILED, core.PASSED, core.FAILED)]
    assert "You square: twice is meant." in lines[1][2]


def test_progress_lists_exercises_in_order_of_number(capsys: pytest.CaptureFixture[str]):
    for number, title, core_ in (("4.10", "tenth", True), ("4.2", "second", False), ("3.9", "before", True)):
        exercise(number, title, core=core_)(lambda answer: choose(answer, "a", {"b": "No."}, "yes"))
    a, b = core.REGISTERED["4.10"], core.REGISTERED["3.9"]
    a.outcome, b.outcome = core.PASSED, core.FAILED
    progress()
    assert capsys.readouterr().out.splitlines() == [
        "[-] 3.9  before (core): not yet",
        "[ ] 4.2  second (bonus): not attempted",
        "[x] 4.10 tenth (core): passed",
        "1 of 3 passed, 1 of 2 core exercises",
    ]


def test_passed_exercises_of_the_same_notebook_are_counted(capsys: pytest.CaptureFixture[str]):
    checks = [exercise(number, "q", kind="predict")(lambda answer: "well") for number in ("4.1", "4.2", "40.1")]
    for check in checks:
        check("a")
    said = capsys.readouterr().out.splitlines()
    assert [line.split("). ")[1] for line in said] == [
        "1 of 2 in this notebook.",
        "2 of 2 in this notebook.",
        "1 of 1 in this notebook.",
    ]


def test_the_last_outcome_counts(capsys: pytest.CaptureFixture[str]):
    check = exercise("4.1", "q", kind="predict")(lambda answer: choose(answer, "a", {"b": "No."}, "yes"))
    check("a")
    check("b")
    assert core.REGISTERED["4.1"].outcome == core.FAILED


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="choose from implement"):
        exercise("99.1", "x", kind="exam")


# -- explaining -----------------------------------------------------------------------------------------


def test_a_known_slip_is_named_and_shown(capsys: pytest.CaptureFixture[str]):
    text = said_to(square, capsys)
    assert text.startswith("Exercise 99.1: not yet. You square: twice is meant.\n")
    assert text.splitlines()[2:] == [
        "    input         yours         wanted",
        "     1.00  2.00    1.00  4.00    2.00  4.00",
        "     3.00  4.00    9.00 16.00    6.00  8.00",
    ]


def test_an_unknown_slip_gets_the_place_of_the_largest_difference(capsys: pytest.CaptureFixture[str]):
    text = said_to(lambda x: 2 * x + torch.tensor([[0.0, 0.1], [0.0, 1.0]]), capsys)
    assert "The values are off, most at (1, 1): 9 where 8 is right (tried: two rows)" in text


def test_a_slip_that_cannot_be_computed_is_passed_over():
    def breaks(x: Tensor) -> Tensor:
        raise RuntimeError("not for this shape")

    with pytest.raises(Failed, match="You square"):
        try_cases(square, double, [Case("c", (X,))], {"breaks": breaks, "You square.": square})


def test_large_inputs_are_not_shown():
    big = torch.arange(1600.0).view(40, 40)
    with pytest.raises(Failed) as failure:
        try_cases(square, double, [Case("big", (big,))])
    assert "wanted" not in str(failure.value)


def test_vectors_masks_and_numbers_are_shown():
    v = torch.tensor([0.0, 1.5, -2.0])
    shown = core.side_by_side(Case("v", (v, 2, 0.5, True)), v > 1, v > 9)
    assert shown.splitlines()[2:] == [
        "    input, 2, 0.5       yours   wanted",
        "      .    1.50 -2.00   . x .   . . .",
    ]
    assert core.side_by_side(Case("none", (3,)), 1.0, 2.0) == ""
    assert core.side_by_side(Case("empty", (torch.zeros(0, 3),)), torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (1.0, 2.0, "1 where 2 is right"),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]), "most at (1,): nan where 2 is right"),
        ((1.0, X), (1.0, 2 * X), "Part 2: The values are off, most at (1, 1): 4 where 8 is right"),
        (torch.tensor(1.0), torch.tensor(2.0), "1 where 2 is right"),
        (True, False, "The result is wrong"),
        (X > 1, X > 2, "The result is wrong"),
    ],
)
def test_differences_in_words(got: Any, want: Any, says: str):
    assert says in core.difference(got, want)


# -- like and close -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0])),  # a loop over Python floats
        (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0])),
        (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2])),
        (torch.tensor(1.5), 1.5),
        (torch.tensor([1.5]), 1.5),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.tensor(1.5, dtype=torch.float64).numpy(), 1.5),
        (2, 2.0),
        (2.0, 2),
        ([1.0, 2.0], (1.0, 2.0)),
        ((torch.tensor(1.0), torch.ones(2)), (1.0, torch.ones(2))),
        (True, True),
        ({"a": 1}, {"a": 1}),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0])),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0])),
    ],
)
def test_what_is_equal_enough(got: Any, want: Any):
    value = like(got, want)
    assert close(value, want)
    assert not isinstance(value, Tensor) or not value.requires_grad


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (torch.ones(2), 1.0, "must be one number, and is a tensor of shape (2,)"),
        ("x", 1.0, "must be one number, and is a str"),
        (None, 1.0, "must be one number, and is None"),
        (1.0, torch.tensor(1.0), "must be a tensor of shape (), and is a float"),
        (torch.ones(1), torch.tensor(1.0), "has shape (1,), and () was wanted"),
        (1, True, "must be a bool, and is a int"),
        (torch.tensor([1, 0]), torch.tensor([True, False]), "has dtype torch.int64, and torch.bool was wanted"),
        (torch.tensor([True]), torch.tensor([1]), "has dtype torch.bool, and torch.int64 was wanted"),
        (1.0, (1.0, 2.0), "must be 2 things, as in `return a, b`, and is a float"),
        ((1.0,), (1.0, 2.0), "must be 2 things, as in `return a, b`, and is a tuple of 1"),
        ((1.0, "x"), (1.0, 2.0), "part 2 of the result must be one number"),
        (torch.tensor([math.nan]), torch.tensor([1.0]), "holds NaN"),
    ],
)
def test_what_is_of_another_kind(got: Any, want: Any, says: str):
    with pytest.raises(Failed) as failure:
        like(got, want)
    assert says in str(failure.value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1.0, 1.001),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.tensor([1.0, math.nan])),
        ((1.0, 2.0), (1.0, 2.0, 3.0)),
        (1.0, (1.0,)),
        (math.nan, 1.0),
        (True, False),
        ("a", "b"),
        (torch.ones(2), 1.0),
    ],
)
def test_what_is_not_close(a: Any, b: Any):
    assert not close(a, b)


# -- questions and measured numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["a", "A", "(a)", " a "])
def test_letters_are_taken_as_people_write_them(answer: str):
    assert choose(answer, "a", {"b": "No."}, "yes") == "yes"


def test_a_wrong_letter_gets_its_sentence_and_no_letter_the_list():
    with pytest.raises(Failed, match="No: b is"):
        choose("b", "a", {"b": "No: b is wrong."}, "yes")
    for answer in ("d", 7, "because of a"):
        with pytest.raises(Failed, match="is none of the letters a, b"):
            choose(answer, "a", {"b": "No."}, "yes")


def test_measured_numbers():
    assert measure(torch.tensor(0.501), 0.5, 0.01, unit=" nats") == "0.501 nats"
    with pytest.raises(Failed, match="You forgot the mean"):
        measure(0.9, 0.5, 0.01, {"You forgot the mean.": 0.9})
    with pytest.raises(Failed, match=r"0\.7 is not what this measures to"):
        measure(0.7, 0.5, 0.01, {"You forgot the mean.": 0.9})
    with pytest.raises(Failed, match="your answer must be one number"):
        measure("a half", 0.5, 0.01)
    with pytest.raises(Failed, match="nan is not what"):
        measure(math.nan, 0.5, 0.01)
