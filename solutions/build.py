"""`python -m solutions.build [00 04 ...]`: from the masters to both editions of the notebooks.

    solutions/src/NN_name.py  ->  solutions/NN_name.ipynb   solved and executed, every exercise passed
                              ->  notebooks/NN_name.ipynb   stubs, no solutions, no outputs

A master is a script in percent format (`# %%` opens a cell). Between `### BEGIN SOLUTION` and `### END SOLUTION` stands
what the exercise edition leaves out; there a stub takes its place: the lines that begin with `#:`, or
`raise NotImplementedError`. Cells tagged `solution` are left out whole. The cell tagged `setup` is the same everywhere
and is filled in here. Only what changed is built: a solved notebook is executed again if a cell of it changed, or if
it is named on the command line. The package's own changes are not seen: name the notebooks that they concern, or `all`.
"""

from __future__ import annotations

import os
import re
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
MASTERS, EXERCISES = HERE / "src", HERE.parent / "notebooks"
SECONDS = 300  # for one cell
REGION = re.compile(r"^( *)### BEGIN SOLUTION\n(.*?)^ *### END SOLUTION(?:\n|\Z)", re.DOTALL | re.MULTILINE)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SETUP = """\
# Set-up. Run this first; running it again does no harm. It never replaces the PyTorch that is installed.
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

COURSE = "{repository}"  # where the course can be had
if importlib.util.find_spec("tutorial_sae") is None:
    if not COURSE:
        raise ModuleNotFoundError(
            "The course has no public address yet. Upload or unpack its folder, then run there: "
            "pip install -r requirements.txt (on Colab: pip install .)"
        )
    if not os.path.isdir("tutorial_sae_course"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", COURSE, "tutorial_sae_course"], check=True)
    torch_here = importlib.util.find_spec("torch") and ["torch==" + importlib.metadata.version("torch")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "./tutorial_sae_course", *(torch_here or [])]
    subprocess.run(install, check=True)
if os.path.isdir("tutorial_sae_course/notebooks"):
    os.chdir("tutorial_sae_course/notebooks")  # from there the committed results are found

from tutorial_sae.runtime import hardware

machine = hardware()
print(f"{{machine['processor']}}, {{machine['cores']}} cores, {{machine['memory_gb']:.0f}} GB of memory")
print("GPU:", machine["gpu"] or "none, and none is needed here")"""


def repository() -> str:
    """The course's public address, from the one place that holds it: `[project.urls]` in pyproject.toml."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def masters() -> list[Path]:
    return sorted(MASTERS.glob("[0-9][0-9]_*.py"))


def solved(master: Path) -> NotebookNode:
    """The solved edition, not yet executed."""
    notebook = jupytext.read(master, fmt="py:percent")
    return _finished(notebook, master.stem, _answer)


def exercise(master: Path) -> NotebookNode:
    """The exercise edition."""
    notebook = jupytext.read(master, fmt="py:percent")
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    return _finished(notebook, master.stem, _stub)


def _stub(region: re.Match[str]) -> str:
    lines = [line for line in region[2].splitlines() if line.strip().startswith("#:")]
    stub = [line.replace("#: ", "", 1).replace("#:", "", 1) for line in lines] or [
        region[1] + "raise NotImplementedError"
    ]
    return "\n".join(stub) + "\n"


def _answer(region: re.Match[str]) -> str:
    return "".join(line for line in region[2].splitlines(keepends=True) if not line.strip().startswith("#:"))


def _finished(notebook: NotebookNode, stem: str, fill: Callable[[re.Match[str]], str]) -> NotebookNode:
    """The notebook with its regions filled, and nothing in it that a rebuild would change."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    number, seen = "", dict[str, int]()
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if heading := re.search(r"^#+ Exercise (\d+\.\d+)", cell.source, re.MULTILINE):
            number = heading[1]
        # a line of its own for what an exercise teaches
        cell.source = re.sub(r"^(> Difficulty: .*\S)$", r"\1  ", cell.source, flags=re.MULTILINE)
        if "setup" in tags:
            cell.source = SETUP.format(repository=repository())
            tags = [*tags, "nbval-ignore-output"]
        kind: dict[str, Any] = {}
        if cell.cell_type == "code" and REGION.search(cell.source):
            kind = {"grade": False, "solution": True, "locked": False}
            cell.source = REGION.sub(fill, cell.source).rstrip("\n")
        elif cell.cell_type == "code" and cell.source.startswith("check."):
            kind = {"grade": True, "solution": False, "locked": True, "points": 1}
        metadata: dict[str, Any] = {"tags": tags} if tags else {}
        if kind:
            name = ("check-" if kind["grade"] else "answer-") + (number or str(i)).replace(".", "-")
            seen[name] = seen.get(name, 0) + 1
            name += f"-{seen[name]}" if seen[name] > 1 else ""  # an exercise may ask for two things in two cells
            metadata["nbgrader"] = kind | {"grade_id": name, "schema_version": 3, "task": False}
        cell.metadata = nbformat.from_dict(metadata)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.id = f"{stem[:2]}-{i:03d}"
    return notebook


def execute(notebook: NotebookNode, *, strict: bool = True) -> None:
    """Run all cells, in the folder of the solutions, on the CPU, so that the outputs are the same on all machines."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    environment |= {"TUTORIAL_SAE_STRICT": "1"} if strict else {}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,  # a stream comes in one piece or in two, as it happens
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)


def sources(notebook: NotebookNode) -> list[Any]:
    """What a notebook says and asks, without what came out."""
    return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def write(notebook: NotebookNode, path: Path) -> bool:
    """Write a notebook if that changes the file; says whether it did."""
    text = nbformat.writes(notebook) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def build(master: Path, *, again: bool = False) -> list[str]:
    """Build both editions of one master where they are not up to date; gives what was written."""
    done = []
    target = HERE / f"{master.stem}.ipynb"
    notebook = solved(master)
    if again or not target.exists() or sources(nbformat.read(target, as_version=4)) != sources(notebook):
        start = time.perf_counter()
        execute(notebook)
        write(notebook, target)
        done.append(f"{target.name}: executed in {time.perf_counter() - start:.0f} s")
    if write(exercise(master), EXERCISES / target.name):
        done.append(f"notebooks/{target.name}: written")
    return done


def main(names: list[str]) -> None:
    for master in masters():
        named = "all" in names or any(master.stem.startswith(name) for name in names)
        if named or not names:
            for line in build(master, again=named) or [f"{master.stem}: up to date"]:
                print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
