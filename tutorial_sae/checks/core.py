"""What all checks share: running an answer safely, comparing it, and saying what is wrong with it.

A check is a function that calls the learner's answer and raises `Failed` with a sentence, or returns what it tried.
`exercise` wraps it: an untouched stub is "not attempted yet", an endless loop is stopped, a flood of output is cut, an
exception is shown with the line of the learner's code that raised it, and the outcome is kept for `progress` and for
`grade`. Wrong values are explained by imitation: a check lists known slips as functions that make them, and an answer
that agrees with one of them gets that slip's sentence.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("implement", "predict", "diagnose", "measure", "break it", "prove", "open-ended")
PASSED, FAILED, OPEN = "passed", "not yet", "not attempted"
SHOWN_OUTPUT = 2_000  # characters of what an answer prints
RECORD = "TUTORIAL_SAE_RECORD"  # names the file to which outcomes are added, for `grade`
STRICT = "TUTORIAL_SAE_STRICT"
# where a learner's code does not stand: this package, the standard library, other packages
HERE = str(Path(__file__).parent)
NOT_MINE = (str(Path(__file__).parent.parent), str(Path(os.__file__).parent), sys.prefix)


class Failed(Exception):
    """The answer is not right yet; the message says what was got, what was wanted, and the likely slip."""


class OutOfTime(BaseException):
    """Not an `Exception`, so that an answer's own `except Exception` does not swallow it."""


class _Untouched(Exception):
    """The stub is as it was."""


@dataclass
class Exercise:
    number: str  # "4.1": notebook and place in it
    title: str
    kind: str
    core: bool
    outcome: str = OPEN


REGISTERED: dict[str, Exercise] = {}


def exercise(
    number: str, title: str, *, kind: str = "implement", core: bool = True, seconds: int = 15
) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """Make a check of a function that takes the learner's answers, and raises `Failed` or says what it tried."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose from {', '.join(KINDS)}")

    def wrap(check: Callable[..., str]) -> Callable[..., None]:
        entry = REGISTERED[number] = Exercise(number, title, kind, core)

        @functools.wraps(check)
        def run(*answers: Any) -> None:
            entry.outcome, message = _judge(check, answers, seconds)
            text = f"Exercise {number}: {message}"
            if entry.outcome == PASSED:
                mine = [e for e in REGISTERED.values() if e.number.split(".")[0] == number.split(".")[0]]
                text += f" {sum(e.outcome == PASSED for e in mine)} of {len(mine)} in this notebook."
            if path := os.environ.get(RECORD):
                with Path(path).open("a", encoding="utf-8") as file:
                    file.write(json.dumps([number, entry.outcome, message]) + "\n")
            if entry.outcome != PASSED and os.environ.get(STRICT) == "1":
                raise AssertionError(text)
            print(text)

        return run

    return wrap


def progress() -> None:
    """Print how far you are in the notebooks whose checks are loaded."""
    for entry in sorted(REGISTERED.values(), key=lambda e: [int(part) for part in e.number.split(".")]):
        mark = {PASSED: "x", FAILED: "-", OPEN: " "}[entry.outcome]
        print(f"[{mark}] {entry.number:<5}{entry.title} ({'core' if entry.core else 'bonus'}): {entry.outcome}")
    solved = [e for e in REGISTERED.values() if e.outcome == PASSED]
    core = [e for e in REGISTERED.values() if e.core]
    print(f"{len(solved)} of {len(REGISTERED)} passed, {sum(e.core for e in solved)} of {len(core)} core exercises")


# -- running an answer ------------------------------------------------------------------------------


def _judge(check: Callable[..., str], answers: Sequence[Any], seconds: int) -> tuple[str, str]:
    """(outcome, sentence) of a check, whatever the answer does."""
    printed, grad, outcome = _Printed(), torch.is_grad_enabled(), FAILED
    try:
        for answer in answers:
            if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
                raise _Untouched
        with torch.random.fork_rng(), _time_limit(seconds), contextlib.redirect_stdout(printed):
            tried = check(*answers)
        outcome, message = PASSED, f"passed ({tried})."
    except _Untouched:
        outcome, message = OPEN, "not attempted yet. Put your answer in place of `...` and run the cell again."
    except Failed as failure:
        text = re.sub(r"^[a-z](?=[a-z]* (?!=))", lambda first: first[0].upper(), str(failure))
        message = f"not yet. {text}"
    except OutOfTime:
        message = f"not yet. Your code was stopped after {seconds} seconds: is there a loop that never ends?"
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit too: an answer must not end the notebook
        if isinstance(error, NotImplementedError) and not error.args:  # PyTorch's own have a message
            outcome, message = OPEN, "not attempted yet. Replace `raise NotImplementedError` and run the cell again."
        else:
            message = f"not yet. Your code raised {type(error).__name__}: {_short(error)}{_where(error)}"
    finally:
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
    return outcome, message + printed.report()


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "(no message)"
    return text if len(text) < 300 else text[:300] + " ..."


def _where(error: BaseException) -> str:
    """The last line of the learner's own code on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if not f.filename.startswith(NOT_MINE) and "site-packages" not in f.filename and f.line]
    return f"\n    line {mine[-1].lineno} of your cell: {mine[-1].line}" if mine else ""


class _Printed(io.StringIO):
    """What an answer prints, up to a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, text: str) -> int:
        super().write(text[: max(0, SHOWN_OUTPUT - self.count)])
        self.count += len(text)
        return len(text)

    def report(self) -> str:
        if not self.count:
            return ""
        cut = f" (the first {SHOWN_OUTPUT:,} of {self.count:,} characters)" if self.count > SHOWN_OUTPUT else ""
        return f"\nYour code printed{cut}:\n{self.getvalue().rstrip()}\n"


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise `OutOfTime` after so long, where the system has alarms; `grade` has a limit of its own besides."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # and again, should the answer swallow the first
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # at most one more alarm, half a second apart, can have come in between
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def call(f: Any, *args: Any, **kwargs: Any) -> Any:
    """`f(*args)`, refused if `f` is no function, or changes a tensor that it was given or the gradient mode."""
    if not callable(f):
        raise Failed(f"a function was wanted, and this is {_kind(f)}: give the function itself, without calling it.")
    given = [(a, a.detach().clone()) for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
    grad = torch.is_grad_enabled()
    result = f(*args, **kwargs)
    if torch.is_grad_enabled() != grad:
        torch.set_grad_enabled(grad)
        raise Failed(
            "your function switches gradients off (or on) for everything after it: use `with torch.no_grad():`."
        )
    for tensor, copy in given:
        if tensor.shape != copy.shape or not torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num()):
            with torch.no_grad():
                tensor.set_(copy) if tensor.shape != copy.shape else tensor.copy_(copy)  # type: ignore[arg-type]
            raise Failed("your function changes the tensor that it is given. Work on a copy: `x = x.clone()`.")
    return result


# -- comparing --------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return "None (is a `return` missing?)" if value is None else f"a {type(value).__name__}"


def like(got: Any, want: Any, what: str = "the result") -> Any:
    """`got`, refused unless it is of the kind, shape and precision of `want`; a tensor of one number will do as one."""
    if isinstance(want, tuple):
        if not isinstance(got, tuple | list) or len(got) != len(want):
            n = f" of {len(got)}" if isinstance(got, tuple | list) else ""
            raise Failed(f"{what} must be {len(want)} things, as in `return a, b`, and is {_kind(got)}{n}.")
        return tuple(like(g, w, f"part {i + 1} of {what}") for i, (g, w) in enumerate(zip(got, want, strict=True)))
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor):
            raise Failed(f"{what} must be a tensor of shape {tuple(want.shape)}, and is {_kind(got)}.")
        if got.shape != want.shape:
            raise Failed(f"{what} has shape {tuple(got.shape)}, and {tuple(want.shape)} was wanted.")
        if got.is_floating_point() != want.is_floating_point() or (want.dtype == torch.bool) != (
            got.dtype == torch.bool
        ):
            raise Failed(f"{what} has dtype {got.dtype}, and {want.dtype} was wanted.")
        if got.is_floating_point() and torch.isnan(got).any() and not torch.isnan(want).any():
            raise Failed(f"{what} holds NaN: a division of 0 by 0, perhaps?")
        return got.detach()
    if isinstance(want, bool | str | dict | list):
        if not isinstance(got, type(want)):
            raise Failed(f"{what} must be a {type(want).__name__}, and is {_kind(got)}.")
        return got
    try:
        return float(got.detach() if isinstance(got, Tensor) else got)
    except (TypeError, ValueError, RuntimeError):
        raise Failed(f"{what} must be one number, and is {_kind(got)}.") from None


def close(a: Any, b: Any, tol: float = 1e-4) -> bool:
    """Equal up to `tol`, relative to the larger of |b| and 1; tuples part by part."""
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) == len(b) and all(close(x, y, tol) for x, y in zip(a, b, strict=True))
    if isinstance(b, Tensor):
        return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double(), tol, tol, True)
    if isinstance(b, bool | str | list | dict):
        return a == b
    return not isinstance(a, Tensor | tuple) and math.isclose(a, b, rel_tol=tol, abs_tol=tol)


class Case(NamedTuple):
    """Inputs to try, and what they try; small cases come first, so that the first to fail is easy to look at."""

    name: str
    args: tuple[Any, ...]


def try_cases(
    f: Any,
    oracle: Callable[..., Any],
    cases: Iterable[Case],
    slips: Mapping[str, Callable[..., Any]] | None = None,
    *,
    tol: float = 1e-4,
) -> str:
    """Call `f` on every case and hold it against `oracle`; a known slip is named. Gives the names of the cases."""
    names = []
    for case in cases:
        want = oracle(*case.args)
        got = like(call(f, *case.args), want)
        if not close(got, want, tol):
            explain(got, want, case, slips or {}, tol)
        names.append(case.name)
    return ", ".join(dict.fromkeys(names))


def sentences(check: Any, **slips: Callable[..., Any]) -> dict[str, Any]:
    """The sentences in a check's docstring, `name: sentence` with further lines indented deeper, by name; or `slips`,
    given by the same names, by their sentences."""
    parts = re.findall(r"^(\w+): (.*(?:\n +.*)*)", inspect.cleandoc(check.__doc__), re.MULTILINE)
    found = {name: " ".join(sentence.split()) for name, sentence in parts}
    return {found[name]: slip for name, slip in slips.items()} or found


def explain(got: Any, want: Any, case: Case, slips: Mapping[str, Callable[..., Any]], tol: float = 1e-4) -> None:
    """Raise `Failed` for a wrong result: with the sentence of the slip that gives the same, or with the difference."""
    shown = side_by_side(case, got, want)
    for sentence, wrong in slips.items():
        with contextlib.suppress(ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
            if close(got, wrong(*case.args), tol):
                raise Failed(f"{sentence}{shown}")
    raise Failed(f"{difference(got, want)} (tried: {case.name}){shown}")


def difference(got: Any, want: Any) -> str:
    if isinstance(want, tuple):
        number = next(i for i, (g, w) in enumerate(zip(got, want, strict=True)) if not close(g, w))
        return f"Part {number + 1}: {difference(got[number], want[number])}"
    if isinstance(want, Tensor) and want.dtype != torch.bool:
        off = (got.double() - want.double()).abs().nan_to_num(math.inf)
        place = tuple(int(i) for i in (off == off.max()).nonzero()[0])
        where = f"The values are off, most at {place}: " if place else ""
        return f"{where}{got[place]:.4g} where {want[place]:.4g} is right"
    if isinstance(want, float | int) and not isinstance(want, bool):
        return f"{got:.4g} where {want:.4g} is right"
    return "The result is wrong"


def side_by_side(case: Case, got: Any, want: Any) -> str:
    """Small matrices of a failing case next to each other; nothing where they are not small."""
    parts = [a for a in case.args if isinstance(a, Tensor)][:1] + [v for v in (got, want) if isinstance(v, Tensor)]
    if len(parts) != 3 or any(p.dim() not in (1, 2) or p.shape[-1] > 10 or p.numel() > 60 for p in parts):
        return ""
    numbers = ", ".join(f"{a:g}" for a in case.args if isinstance(a, int | float) and not isinstance(a, bool))
    heads = ["input" + (f", {numbers}" if numbers else ""), "yours", "wanted"]
    blocks = [[" ".join(_cell(v) for v in row) for row in part.reshape(-1, part.shape[-1]).tolist()] for part in parts]
    widths = [max(map(len, [head, *block])) for head, block in zip(heads, blocks, strict=True)]
    lines = ["   ".join(head.ljust(w) for head, w in zip(heads, widths, strict=True))]
    for i in range(max(map(len, blocks))):
        row = [block[i] if i < len(block) else "" for block in blocks]
        lines.append("   ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))
    return "\n\n" + "\n".join("    " + line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "x" if value else "."
    return "  .  " if value == 0 else f"{value:5.2f}"


# -- answers that are not functions -----------------------------------------------------------------


def choose(answer: Any, right: str, wrong: Mapping[str, str], praise: str) -> str:
    """A question with lettered answers: `wrong` says of each wrong letter what speaks against it."""
    letter = str(answer).strip().strip("()").lower()
    if letter in wrong:
        raise Failed(wrong[letter])
    if letter != right:
        raise Failed(f"{answer!r} is none of the letters {', '.join(sorted([right, *wrong]))}.")
    return praise


def measure(answer: Any, want: float, tol: float, slips: Mapping[str, float] | None = None, unit: str = "") -> str:
    """A measured number, right within `tol`; `slips` has the numbers that known mistakes give."""
    got = like(answer, 0.0, "your answer")
    if abs(got - want) <= tol:
        return f"{got:.4g}{unit}"
    for sentence, value in (slips or {}).items():
        if abs(got - value) <= tol:
            raise Failed(sentence)
    raise Failed(f"{got:.4g}{unit} is not what this measures to. Look again at what is divided by what.")
