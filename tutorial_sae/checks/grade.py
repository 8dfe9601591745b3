"""Run students' notebooks and say who passed what: `python -m tutorial_sae grade FOLDER`.

FOLDER holds notebooks, one a submission, or a folder for each student with notebooks in it. Each notebook runs in a
process of its own, from top to bottom and on after a cell that raises, in an empty folder and without a GPU, standard
input or network, up to a limit of time and of memory; what it prints is thrown away. The outcomes are those of the
checks (the last one of each exercise), added to a file outside FOLDER as they are made, so that a notebook that has to
be stopped keeps what it had. Nothing is written into FOLDER.

All this protects from accidents: endless loops, memory that runs out, notebooks that are none. It does not protect from
attacks. A notebook is a program that runs with your rights: it can read and write your files, start programs that do
use the network, and, with some effort, forge its own outcomes. Grade strangers' work in a container or on a machine of
its own, and look into what seems too good.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import psutil

from tutorial_sae.checks import core

LESSON = re.compile(r"\btutorial_sae\.checks(?:\.|\s+import\b.*?\b)nb(\d\d)\b|^#+ Exercise (\d+)\.\d", re.MULTILINE)
ENVIRONMENT = dict.fromkeys(("HF_HUB_OFFLINE", "PIP_NO_INDEX", "PYTHONDONTWRITEBYTECODE", "PYTHONUTF8"), "1")
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", core.STRICT: "0"}
Exercises = dict[str, dict[str, Any]]  # for each number the title, core, outcome and message


def grade(folder: str | Path, seconds: float = 300.0, memory_gb: float = 3.0, jobs: int = 1) -> Iterator[Any]:
    """Grade every notebook below a folder, in order of name, `jobs` of them at a time.

    Gives for each a dict: `student`, `notebook` (its path below the folder), `exercises` (for each number its `title`,
    `core`, `outcome` and `message`) and a `note`, which says what went wrong, if anything did.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that holds the students' notebooks")
    files = sorted(p for p in root.rglob("*.ipynb") if p.is_file() or p.is_symlink())
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{folder} holds no notebook (*.ipynb), nor do the folders in it")
    if min(seconds, memory_gb, jobs) <= 0:
        raise ValueError("the limits of time and memory and the number of jobs must be positive")
    limits: dict[str, Any] = {"seconds": seconds, "gb": memory_gb, "threads": max(1, (os.cpu_count() or 1) // jobs)}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(lambda file: _grade_one(root, file, limits), files)
        finally:
            limits["seconds"] = 0  # Ctrl-C must not wait for what still runs


def _grade_one(root: Path, file: Path, limits: dict[str, Any]) -> dict[str, Any]:
    below = file.relative_to(root)
    row: dict[str, Any] = {"student": below.parts[0].removesuffix(".ipynb"), "notebook": below.as_posix()}
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            raise ValueError("it is a link to a file outside of the folder, and such links are not followed")
        cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(file.read_text("utf-8-sig"))["cells"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = "it has no list of cells" if isinstance(error, KeyError | TypeError) else error
        return row | {"exercises": {}, "note": f"not a notebook: {what}"}
    exercises = _expected("\n".join(source for _, source in cells))
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as place:
        Path(place, "work").mkdir()
        Path(place, "record").touch()
        Path(place, "cells").write_text(json.dumps([source for kind, source in cells if kind == "code"]), "utf-8")
        how = _run(place, str(file.parent.resolve()), limits)
        notes = list(_read(Path(place, "record").read_text("utf-8", "replace"), exercises, how))
    return row | {"exercises": exercises, "note": "; ".join(notes)}


def _expected(text: str) -> Exercises:
    """All exercises of the lessons that a notebook imports the checks of, or has a heading of an exercise of."""
    lessons = {int(imported or heading) for imported, heading in LESSON.findall(text)}
    for lesson in lessons:
        with suppress(ModuleNotFoundError):
            importlib.import_module(f"tutorial_sae.checks.nb{lesson:02d}")
    places = {tuple(map(int, number.split("."))): e for number, e in list(core.REGISTERED.items())}
    mine = [e for place, e in sorted(places.items()) if place[0] in lessons]
    return {e.number: {"title": e.title, "core": e.core, "outcome": core.OPEN, "message": ""} for e in mine}


def _run(place: str, folder: str, limits: dict[str, Any]) -> str:
    """Run the cells in a process of its own; says why that was stopped, or how it ended."""
    path = os.pathsep.join(filter(None, [str(Path(core.HERE).parent.parent), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "IPYTHONDIR": place, "OMP_NUM_THREADS": str(limits["threads"])}
    how: dict[str, Any] = {"cwd": f"{place}/work", "env": os.environ | ENVIRONMENT | own, "start_new_session": True}
    how |= dict.fromkeys(("stdin", "stdout", "stderr"), DEVNULL)
    process = psutil.Popen([sys.executable, "-m", "tutorial_sae.checks.grade", place, folder], **how)
    start = time.monotonic()
    try:
        while process.poll() is None:
            if time.monotonic() - start > limits["seconds"]:
                return f"stopped after {limits['seconds']:g} s"
            with suppress(psutil.Error):
                if sum(p.memory_info().rss for p in [process, *process.children(True)]) > limits["gb"] * 1e9:
                    return f"used more than {limits['gb']:g} GB"
            time.sleep(0.1)
        return f"ended early, with exit status {process.returncode}"
    finally:
        with suppress(OSError, AttributeError):  # it, and what it started and has left running
            os.killpg(process.pid, 9)
        with suppress(psutil.Error):
            process.kill()
        process.wait()


def _read(record: str, exercises: Exercises, how: str) -> Iterator[str]:
    """Put the recorded outcomes, the last of each, where they belong; gives what else there is to say."""
    said: dict[str, list[Any]] = {"cell": [0], "raised": []}
    for line in record.splitlines():
        with suppress(ValueError, TypeError):  # half a line, of a process that was stopped
            number, what, message = json.loads(line)
            if what in (core.PASSED, core.FAILED, core.OPEN):
                exercises.setdefault(number, {"title": "", "core": False}).update(outcome=what, message=message)
            else:
                said.setdefault(what, []).append(message)
    if "done" not in said:
        yield f"{how}, in code cell {said['cell'][-1]}"
    if not exercises:
        yield "no exercises of this course in it"
    if said["raised"]:
        yield f"{len(said['raised'])} code cells raised, first {said['raised'][0]}"


def _child(place: str, folder: str) -> None:
    """What runs in the process of a notebook."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    record = os.environ[core.RECORD] = str(Path(place, "record"))
    file = os.open(record, os.O_WRONLY | os.O_APPEND)

    def note(what: str, message: Any = "") -> None:
        os.write(file, (json.dumps(["", what, message]) + "\n").encode())

    def guard(event: str, given: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
            there = given[:1] if event == "socket.getaddrinfo" else given[1]
            host = there[0] if isinstance(there, tuple) else ""  # of a socket that is a file
            if host not in (None, "", "localhost", "::1") and not str(host).startswith("127."):
                raise PermissionError(f"notebooks are graded without a network, and this one calls {host}")
        if event == "open" and str(given[0]) == record and not _called_by(core.__file__):
            raise PermissionError("only checks write into the record of outcomes")

    sys.path.insert(1, folder)  # for modules of the student's own
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    shell.enable_gui = lambda gui=None: None  # for %matplotlib
    cells = json.loads(Path(place, "cells").read_text("utf-8"))
    sys.addaudithook(guard)
    for number, source in enumerate(cells, 1):
        note("cell", number)
        try:
            result = shell.run_cell(source)
            error = result.error_before_exec or result.error_in_exec
        except BaseException as escaped:  # from IPython, broken by a cell
            error = escaped
        if error:
            note("raised", f"cell {number}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    note("done")
    os._exit(0)  # whatever threads are left


def _called_by(file: str) -> bool:
    return any(frame.f_code.co_filename == file for frame, _ in traceback.walk_stack(None))


if __name__ == "__main__":
    _child(*sys.argv[1:])
