"""Both editions of every notebook: in step with the master, executed, solved, and without a solution given away."""

from __future__ import annotations

import importlib
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from solutions import build
from tutorial_sae.checks import core

MASTERS = build.masters()
SOLVED = [build.HERE / f"{master.stem}.ipynb" for master in MASTERS]
OPEN = [build.EXERCISES / f"{master.stem}.ipynb" for master in MASTERS]
LARGEST = 1_500_000  # bytes
COMMON = {"with torch.no_grad():", "handle.remove()"}  # lines of solutions that give nothing away

each = pytest.mark.parametrize("master", MASTERS, ids=[master.stem for master in MASTERS])


def solved(master: Path) -> NotebookNode:
    return nbformat.read(build.HERE / f"{master.stem}.ipynb", as_version=4)


def exercises(master: Path) -> NotebookNode:
    return nbformat.read(build.EXERCISES / f"{master.stem}.ipynb", as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(notebook: NotebookNode) -> str:
    return "".join(o.get("text", "") for cell in code(notebook) for o in cell.outputs if o.output_type == "stream")


def registered(master: Path) -> dict[str, core.Exercise]:
    """The exercises of a lesson by number, in order."""
    importlib.import_module(f"tutorial_sae.checks.nb{master.stem[:2]}")
    mine = [e for n, e in core.REGISTERED.items() if n.split(".")[0] == str(int(master.stem[:2]))]
    return {e.number: e for e in sorted(mine, key=lambda e: int(e.number.split(".")[1]))}


def tokens(line: str) -> list[str]:
    try:
        found = tokenize.generate_tokens(io.StringIO(line.strip()).readline)
        return [t.string for t in found if t.string.strip() and t.type != tokenize.COMMENT]
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return line.split()


def test_there_is_a_master_for_every_notebook_and_no_other():
    assert MASTERS
    assert sorted(build.HERE.glob("*.ipynb")) == SOLVED
    assert sorted(build.EXERCISES.glob("*.ipynb")) == OPEN


@each
def test_both_editions_are_in_step_with_the_master(master: Path):
    assert build.sources(solved(master)) == build.sources(build.solved(master))
    text = nbformat.writes(build.exercise(master)) + "\n"
    assert (build.EXERCISES / f"{master.stem}.ipynb").read_text("utf-8") == text


@each
def test_no_solution_is_given_away(master: Path):
    notebook = exercises(master)
    secret = set()
    for _, body in build.REGION.findall(master.read_text("utf-8")):
        lines = [line for line in body.splitlines() if not line.strip().startswith("#:")]
        stub = {line.strip().removeprefix("#:").strip() for line in body.splitlines() if line.strip().startswith("#:")}
        secret |= {line.strip() for line in lines if len(tokens(line)) >= 3} - stub
    given = {line.strip() for cell in code(notebook) for line in cell.source.splitlines()}
    assert not secret & given - COMMON
    for cell in notebook.cells:
        assert "SOLUTION" not in cell.source
        assert "solution" not in tags(cell)
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@each
def test_the_solved_edition_is_executed_without_a_fault(master: Path):
    cells = code(solved(master))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", output
        assert not cell.source.rstrip().endswith(";"), "nbval would see another output"


@each
def test_every_exercise_is_there_and_solved(master: Path):
    said = printed(solved(master))
    for number in registered(master):
        assert f"Exercise {number}: passed" in said, number
    for notebook in (solved(master), exercises(master)):
        graded = [cell for cell in code(notebook) if cell.source.startswith("check.")]
        assert len(graded) == len(registered(master))
        assert any("progress()" in cell.source for cell in code(notebook))


@each
def test_outputs_that_nbval_ignores_are_few_and_asserted(master: Path):
    cells = code(solved(master))
    ignored = [i for i, cell in enumerate(cells) if "nbval-ignore-output" in tags(cell) and "setup" not in tags(cell)]
    assert len(ignored) <= len(cells) / 4
    for i in ignored:
        assert any("assert " in cell.source for cell in cells[i : i + 3]), cells[i].source
    for cell in cells:
        assert set(tags(cell)) <= {"setup", "nbval-ignore-output", "solution"}, tags(cell)


@each
def test_the_format_of_every_exercise(master: Path):
    cells = exercises(master).cells
    pieces = re.split(r"^### Exercise ", "\n\n".join(c.source for c in cells if c.cell_type == "markdown"), flags=re.M)
    headed = {piece.split(":")[0]: piece for piece in pieces[1:]}
    mine = registered(master)
    assert list(headed) == list(mine)
    for number, text in headed.items():
        head = "\n".join(text.splitlines()[:6])
        assert re.search(r"^> Difficulty: .+ · Importance: .+ · about \d+ minutes? · ", head, re.MULTILINE), head
        for name in ("Difficulty", "Importance"):
            dots, count = re.findall(rf"{name}: ([●○]+) (\d)/5", head)[0]
            assert dots == "●" * int(count) + "○" * (5 - int(count)), head
        assert re.search(r"· (core|bonus)\b", head)[1] == ("core" if mine[number].core else "bonus"), head  # type: ignore[index]
        assert re.findall(r"<summary>Hint (\d): ", text) == ["1", "2", "3"], number
        if mine[number].kind not in ("predict", "diagnose"):  # where it may be the letter that was asked for
            assert "<summary>Expected output" in text, number


@each
def test_the_little_things(master: Path):
    for path, notebook in ((SOLVED[0].parent, solved(master)), (OPEN[0].parent, exercises(master))):
        assert (path / f"{master.stem}.ipynb").stat().st_size < LARGEST
        nbformat.validate(notebook)
        ids = [cell.id for cell in notebook.cells]
        assert len(set(ids)) == len(ids)
        set_up = [cell.source for cell in notebook.cells if "setup" in tags(cell)]
        assert set_up == [build.SETUP.format(repository=build.repository())]
        for cell in notebook.cells:
            assert "![](" not in cell.source
            text = cell.source + printed(notebook)
            assert not re.search(r"(?<![\w./+-])/(?:home|root|Users|tmp)/\w", text)
            for tag in re.findall(r"<img[^>]*>", cell.source):
                assert re.search(r'alt="[^"]+"', tag), tag
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    assert has_alt(output), cell.source


def has_alt(output: Any) -> bool:
    metadata = output.get("metadata", {})
    html = "".join(output["data"].get("text/html", ""))
    return bool(metadata.get("image/png", {}).get("alt") or metadata.get("alt") or re.search(r'alt="[^"]+"', html))


@each
def test_metadata_for_nbgrader(master: Path):
    names = []
    for cell in code(exercises(master)):
        if data := cell.metadata.get("nbgrader"):
            assert set(data) - {"points"} == {"grade", "solution", "locked", "task", "grade_id", "schema_version"}
            assert data.schema_version == 3
            assert ("points" in data) == data.grade
            assert re.fullmatch(r"[A-Za-z0-9_-]+", data.grade_id)
            names.append(data.grade_id)
    assert len(set(names)) == len(names), names
    assert sum(name.startswith("check-") for name in names) == len(registered(master))


@pytest.mark.slow
@each
def test_the_exercise_edition_runs_from_top_to_bottom(master: Path):
    notebook = exercises(master)
    build.execute(notebook, strict=False)
    for cell in code(notebook):
        assert not [o for o in cell.outputs if o.output_type == "error"]
        if cell.source.startswith("check."):
            said = "".join(o.get("text", "") for o in cell.outputs)  # the stub of 0.1 is wrong on purpose
            assert "not attempted yet" in said or "Exercise 0.1: not yet" in said, cell.source
    assert re.search(r"^0 of \d+ passed, 0 of \d+ core exercises", printed(notebook), re.MULTILINE)
