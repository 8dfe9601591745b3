"""`grade` on a class in which everything goes wrong that a class can do by accident."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import tutorial_sae.checks
from tutorial_sae import cli
from tutorial_sae.checks import core
from tutorial_sae.checks.grade import grade

# A lesson of three exercises, which exists in these tests only.
LESSON = """
from tutorial_sae.checks.core import Case, choose, exercise, try_cases

@exercise("90.1", "twice")
def twice(f):
    return try_cases(f, lambda x: 2 * x, [Case("two", (2.0,))])

@exercise("90.2", "which", kind="predict")
def which(answer):
    return choose(answer, "a", {"b": "No: b is wrong."}, "a it is")

@exercise("90.10", "one more", core=False)
def more(answer):
    return choose(answer, "c", {}, "c it is")
"""
ALL = ("90.1", "90.2", "90.10")
TWICE = ["def f(x):\n    return 2 * x", "check.twice(f)"]
WHICH = ["check.which('a')"]
LEFT_RUNNING = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"


def notebook(path: Path, *code: str, imports: str = "from tutorial_sae.checks import nb90 as check, progress") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f"import tutorial_sae.checks\ntutorial_sae.checks.__path__.append({LESSONS!r})\n{imports}"
    sources = [("markdown", "# A lesson"), *(("code", source) for source in (start, *code))]
    cells = [{"cell_type": kind, "metadata": {}, "source": text.splitlines(True)} for kind, text in sources]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    return path


LESSONS = ""  # the folder of the lesson, set by the fixture


@pytest.fixture(scope="module", autouse=True)
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global LESSONS
    folder = tmp_path_factory.mktemp("lessons")
    (folder / "nb90.py").write_text(LESSON, "utf-8")
    LESSONS = str(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tutorial_sae.checks, "__path__", [*tutorial_sae.checks.__path__, LESSONS])
        patch.setattr(core, "REGISTERED", dict(core.REGISTERED))
        yield
    sys.modules.pop("tutorial_sae.checks.nb90", None)


def contents(folder: Path) -> dict[str, Any]:
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else "") for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory, lesson: None) -> dict[str, dict[str, Any]]:
    """A class's rows by student, all graded in one go."""
    root = tmp_path_factory.mktemp("class")
    outside = notebook(tmp_path_factory.mktemp("outside") / "elsewhere.ipynb", *TWICE)
    notebook(
        root / "all-right" / "handed in" / "any name.ipynb",
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])",
        "%%time\nimport mine\nmine.write('notes.txt')",
        "import asyncio\nawait asyncio.sleep(0)\n!echo from the shell\nfrom IPython.display import display\ndisplay(3)",
        *TWICE,
        *WHICH,
        "check.more('c')",
        "progress()",
    )
    module = "def write(name):\n    with open(name, 'w') as file:\n        file.write('x')\n"
    (root / "all-right" / "handed in" / "mine.py").write_text(module, "utf-8")
    eat = "import time\nkept = []\nfor _ in range(5):\n    kept.append(bytearray(b'x') * 400_000_000)\ntime.sleep(300)"
    notebook(root / "eats-memory" / "90.ipynb", *WHICH, eat, *TWICE)
    flood = "for _ in range(300):\n    print('x' * 100_000)"
    notebook(root / "prints" / "90.ipynb", flood, "def f(x):\n    print('y' * 5_000_000)\n    return 2 * x", TWICE[1])
    stops = ["import sys\nsys.exit('enough')", "input('your name? ')", "1 / 0", "def f(:", "raise KeyboardInterrupt"]
    notebook(root / "stops-often" / "90.ipynb", *stops, *TWICE)
    notebook(root / "os-exit" / "90.ipynb", *TWICE, LEFT_RUNNING, "import os\nos._exit(0)", *WHICH)
    notebook(root / "last-counts" / "90.ipynb", *WHICH, "check.which('b')", "check.twice(None)", "check.more('?')")
    notebook(root / "deleted-checks" / "90.ipynb", "check.more('c')")
    calls = [
        "import urllib.request\nurllib.request.urlopen('http://example.org')",
        "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)",
        "import os\nopen(os.environ['TUTORIAL_SAE_RECORD'], 'a').write('[\"90.1\", \"passed\", \"\"]\\n')",
        "server = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(server.getsockname())",
    ]
    notebook(root / "calls" / "90.ipynb", *calls)
    headed = notebook(root / "import-gone" / "90.ipynb", imports="pass")
    headed.write_text(headed.read_text("utf-8").replace("# A lesson", "### Exercise 90.2: which"), "utf-8")
    notebook(root / "Zoë Ångström" / "lösung ✓.ipynb", *TWICE)
    notebook(root / "no-checks.ipynb", "1 + 1", imports="pass")
    broken = {
        "not-json": "what is this?",
        "empty": "",
        "a-list": "[1, 2]",
        "no-cells": '{"cells": 3}',
        "odd-cells": '{"cells": [{"cell_type": "code", "source": 7}]}',
        "deep": "[" * 100_000,
    }
    for name, text in broken.items():
        (root / f"{name}.ipynb").write_text(text, "utf-8")
    (root / "latin-1.ipynb").write_bytes("é".encode("latin-1"))
    (root / "a-link.ipynb").symlink_to(outside)
    (root / "nowhere.ipynb").symlink_to(root / "missing.ipynb")
    (root / "a folder.ipynb").mkdir()
    notebook(root / "Zoë Ångström" / ".ipynb_checkpoints" / "lösung-checkpoint.ipynb", *WHICH)

    before, ran_before = contents(root), set(psutil.pids())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(core.STRICT, "1")  # the teacher's, which must not reach the notebooks
        rows = list(grade(root, memory_gb=1.2, jobs=2))
    assert contents(root) == before, "nothing is written into the folder"
    left = [p for p in psutil.process_iter(["pid", "cmdline"]) if "time.sleep(600)" in (p.info["cmdline"] or [""])[-1]]
    assert not [p for p in left if p.pid not in ran_before], "what a notebook leaves running is stopped with it"
    by_student = {row["student"]: row for row in rows}
    assert len(by_student) == len(rows) == 20
    return by_student


def outcomes(row: dict[str, Any]) -> list[str]:
    assert tuple(row["exercises"]) == ALL, "every exercise of the lesson, in order of number"
    return [e["outcome"] for e in row["exercises"].values()]


P, F, O = core.PASSED, core.FAILED, core.OPEN  # noqa: E741


@pytest.mark.parametrize(
    ("student", "found", "says"),
    [
        ("all-right", [P, P, P], ""),
        ("eats-memory", [O, P, O], "used more than 1.2 GB, in code cell 3"),
        ("prints", [P, O, O], ""),
        ("stops-often", [P, O, O], "5 code cells raised, first cell 2: SystemExit: enough"),
        ("os-exit", [P, O, O], "ended early, with exit status 0, in code cell 5"),
        ("last-counts", [O, F, F], ""),
        ("deleted-checks", [O, O, P], ""),
        ("import-gone", [O, O, O], ""),
        ("calls", [O, O, O], "3 code cells raised, first cell 2: "),
        ("Zoë Ångström", [P, O, O], ""),
    ],
)
def test_outcomes_and_notes(graded: dict[str, dict[str, Any]], student: str, found: list[str], says: str):
    row = graded[student]
    assert outcomes(row) == found, row
    assert row["note"].startswith(says) if says else row["note"] == "", row


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ("not-json", "not a notebook: Expecting value"),
        ("empty", "not a notebook: Expecting value"),
        ("a-list", "not a notebook: it has no list of cells"),
        ("no-cells", "not a notebook: it has no list of cells"),
        ("odd-cells", "not a notebook: it has no list of cells"),
        ("deep", "not a notebook: "),
        ("latin-1", "not a notebook: "),
        ("a-link", "not a notebook: it is a link to a file outside of the folder"),
        ("nowhere", "not a notebook: "),
        ("no-checks", "no exercises of this course in it"),
    ],
)
def test_what_is_no_notebook_or_has_no_checks_says_so(graded: dict[str, dict[str, Any]], student: str, says: str):
    assert graded[student]["exercises"] == {}
    assert graded[student]["note"].startswith(says), graded[student]


def test_an_endless_loop_is_stopped_and_what_was_passed_before_is_kept(tmp_path: Path):
    file = notebook(tmp_path / "x.ipynb", *TWICE)
    start = time.monotonic()
    list(grade(tmp_path))
    seconds = round(3 * (time.monotonic() - start) + 3)  # however busy the machine is
    notebook(file, *TWICE, "while True:\n    pass", *WHICH)
    (row,) = grade(tmp_path, seconds=float(seconds))
    assert (outcomes(row), row["note"]) == ([P, O, O], f"stopped after {seconds} s, in code cell 4")


def test_the_network_is_refused_with_a_sentence(graded: dict[str, dict[str, Any]]):
    assert "graded without a network, and this one calls example.org" in graded["calls"]["note"]


def test_the_message_of_a_check_is_kept(graded: dict[str, dict[str, Any]]):
    assert "No: b is wrong." in graded["last-counts"]["exercises"]["90.2"]["message"]
    flood = graded["prints"]["exercises"]["90.1"]["message"]
    assert "2,000 of 5,000,001 characters" in flood
    assert len(flood) < 3_000


def test_student_and_notebook_are_named(graded: dict[str, dict[str, Any]]):
    assert graded["all-right"]["notebook"] == "all-right/handed in/any name.ipynb"
    assert graded["Zoë Ångström"]["notebook"] == "Zoë Ångström/lösung ✓.ipynb"
    assert graded["no-checks"]["notebook"] == "no-checks.ipynb"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["grade", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_prints_a_table_and_machines_get_csv_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, graded: dict[str, Any]
):
    names = ("Zoë Ångström", "no-checks", "last-counts")
    monkeypatch.setattr("tutorial_sae.checks.grade.grade", lambda *_: iter([graded[name] for name in names]))
    status, table, _ = run(capsys, ".")
    assert status == 0
    head, first, second, third, legend = table.splitlines()
    assert head.split() == ["student", "notebook", "core", "all", "exercises"]
    assert first.split()[-7:] == ["1", "of", "2", "1", "of", "3", "x.(.)"]
    assert second.endswith("no exercises of this course in it")
    assert third.endswith(".-(-)")
    assert first.index("1 of 2") == third.index("0 of 2")
    assert "x passed" in legend

    out = tmp_path / "marks.csv"
    status, said, _ = run(capsys, ".", "--format", "csv", "--out", str(out))
    assert (status, said) == (0, "")
    lines = list(csv.DictReader(io.StringIO(out.read_text("utf-8"))))
    assert [(line["student"], line["exercise"], line["outcome"]) for line in lines][:4] == [
        ("Zoë Ångström", "90.1", P),
        ("Zoë Ångström", "90.2", O),
        ("Zoë Ångström", "90.10", O),
        ("no-checks", "", ""),
    ]
    assert [line["core"] for line in lines][:3] == ["True", "True", "False"]
    status, said, _ = run(capsys, ".", "--format", "json")
    assert json.loads(said) == [graded[name] for name in names]


def test_bad_folders_are_refused_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(capsys, str(tmp_path / "missing"))[::2] == (
        2,
        f"error: {tmp_path / 'missing'} is not a folder: name the one that holds the students' notebooks\n",
    )
    (tmp_path / "notes.txt").touch()
    status, _, said = run(capsys, str(tmp_path))
    assert status == 2
    assert "holds no notebook" in said
    notebook(tmp_path / "x.ipynb")
    assert run(capsys, str(tmp_path), "--seconds", "0")[0] == 2
    assert run(capsys, str(tmp_path), "--jobs", "0")[0] == 2
    status, _, said = run(capsys, str(tmp_path), "--out", str(tmp_path / "no" / "marks.csv"))
    assert status == 2
    assert "no such folder" in said


def test_interrupting_does_not_wait_for_what_runs(tmp_path: Path):
    (tmp_path / "a.ipynb").touch()
    for name in "bc":
        notebook(tmp_path / f"{name}.ipynb", "import time", "time.sleep(300)")
    rows = grade(tmp_path)
    next(rows)
    start = time.monotonic()
    rows.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30
    assert not [p for p in psutil.Process(os.getpid()).children() if "tutorial_sae.checks.grade" in p.cmdline()]
