"""The architecture, held by tests: imports go down, a light import stays light, the budget is kept.

The tests that read the source do it with `ast`, so they see an import wherever it stands, also inside a
function or under `if TYPE_CHECKING`, and need none of the package's dependencies.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tutorial_sae"

# -- (a) an import goes down, never up or in a circle -----------------------------------------------

# From the ground up: a module may import what stands before it, and, if it is a folder, its own files.
FLOORS = [
    "runtime",
    "ranks",
    "models",
    "text",
    "activations",
    "saes",
    "sparse",
    "threshold",
    "measures",
    "toy",
    "metrics",
    "training",
    "planning",
    "pretrained",
    "latents",
    "plots",
    "report",
    "widgets",
    "interop",
    "checks",
    "compare",
    "launch",
    "cli",
]
# These two are the front door: they stand above every floor and are imported by none of them.
DOORS = ["__init__", "__main__"]


def imported_names(tree: ast.Module, module: list[str], is_package: bool) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports; `module` is the file's own dotted name, split."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in a/b.py is about a; in a/__init__.py it is about a too.
            depth = len(module) - node.level + is_package
            base = module[:depth] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def module_name(file: Path, package: Path) -> list[str]:
    parts = [package.name, *file.relative_to(package).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def import_faults(package: Path) -> list[str]:
    """What is wrong with the imports inside a package folder, one sentence a fault."""
    files = {".".join(module_name(file, package)): file for file in sorted(package.rglob("*.py"))}
    faults = []
    edges: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        own_floor = file.relative_to(package).with_suffix("").parts[0]
        if own_floor in DOORS:
            continue
        if own_floor not in FLOORS:
            faults.append(
                f"{own_floor} has no floor: give it one in FLOORS (tests/test_house.py), just above the "
                "highest module that it imports"
            )
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        for line, target in imported_names(tree, name.split("."), file.name == "__init__.py"):
            if target.split(".")[0] != package.name:
                continue
            where = f"{file.relative_to(package).as_posix()}:{line} imports {target}"
            inside = target.split(".")[1:]
            if inside == ["__version__"]:
                continue  # a literal on the first lines of __init__.py, below everything
            if inside and inside[0] not in FLOORS and ".".join([package.name, inside[0]]) in files:
                continue  # that module lacks a floor, which is reported where it stands
            if not inside or inside[0] not in FLOORS:
                faults.append(f"{where}: name the module that defines it, not the front door")
            elif inside[0] != own_floor and FLOORS.index(inside[0]) > FLOORS.index(own_floor):
                faults.append(f"{where}: {own_floor} stands below {inside[0]}, and an import goes down")
            # The file meant is the longest dotted prefix that is a file: the rest is a name in it.
            parts = target.split(".")
            known = [".".join(parts[:n]) for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in files]
            if known and known[0] != name:
                edges[name].add(known[0])
    faults += [f"a circle of imports: {' -> '.join(circle)}" for circle in circles(edges)]
    return sorted(set(faults))


def circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    """The circles of a graph, one for each edge that closes one in a depth-first walk."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> Iterator[list[str]]:
        if node in path:
            yield [*path[path.index(node) :], node]
        elif node not in done:
            for target in sorted(edges[node]):
                yield from walk(target, [*path, node])
            done.add(node)

    for start in sorted(edges):
        yield from walk(start, [])


def test_imports_go_down():
    assert not (faults := import_faults(PACKAGE)), "\n" + "\n".join(faults)


def write_package(folder: Path, **sources: str) -> Path:
    package = folder / "tutorial_sae"
    for path, source in {"__init__": "from tutorial_sae.cli import main", **sources}.items():
        file = package / f"{path.replace('__in__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    "source",
    [
        "from tutorial_sae.cli import main",
        "from tutorial_sae import cli",
        "import tutorial_sae.cli",
        "import tutorial_sae.cli as c",
        "from . import cli",
        "from .cli import main",
        "def late():\n    from tutorial_sae.cli import main\n    return main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tutorial_sae.cli import main",
        "import importlib\ncli = importlib.import_module('tutorial_sae.cli')",
        "try:\n    import tutorial_sae.cli\nexcept ImportError:\n    pass",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, source: str):
    faults = import_faults(write_package(tmp_path, metrics=source, cli="def main(): ..."))
    assert len(faults) == 1
    assert "metrics stands below cli" in faults[0]


@pytest.mark.parametrize(
    "source", ["from ..cli import main", "from .. import cli", "from tutorial_sae.cli import main"]
)
@pytest.mark.parametrize("file", ["saes__in__base", "saes__in____init__"])
def test_an_upward_import_is_found_in_a_folder(tmp_path: Path, file: str, source: str):
    faults = import_faults(write_package(tmp_path, **{file: source}, cli="def main(): ..."))
    assert len(faults) == 1
    assert "saes stands below cli" in faults[0]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nimport os.path\nfrom collections import abc",
        "from tutorial_sae.runtime import pick",
        "from .runtime import pick",
        "from . import runtime",
        "from tutorial_sae import __version__",
    ],
)
def test_a_downward_import_is_no_fault(tmp_path: Path, source: str):
    assert import_faults(write_package(tmp_path, metrics=source, runtime="def pick(): ...")) == []


def test_files_of_one_folder_may_import_each_other(tmp_path: Path):
    assert not import_faults(
        write_package(
            tmp_path,
            saes__in____init__="from .base import A\nfrom tutorial_sae.saes.vanilla import B",
            saes__in__vanilla="from .base import A",
            saes__in__base="from ..runtime import pick\nA = 1",
            runtime="def pick(): ...",
        )
    )


@pytest.mark.parametrize("back", ["from .vanilla import B", "from . import vanilla", "from tutorial_sae.saes import B"])
def test_a_circle_is_found(tmp_path: Path, back: str):
    faults = import_faults(
        write_package(
            tmp_path,
            saes__in____init__="from .vanilla import B",
            saes__in__vanilla="from .base import A",
            saes__in__base=f"def late():\n    {back}",
        )
    )
    assert any("circle" in fault for fault in faults)


@pytest.mark.parametrize("source", ["import tutorial_sae", "from tutorial_sae import load_sae"])
def test_the_front_door_is_not_imported_from_inside(tmp_path: Path, source: str):
    (fault,) = import_faults(write_package(tmp_path, metrics=source))
    assert "front door" in fault


@pytest.mark.parametrize("files", [["helpers"], ["helpers__in____init__", "helpers__in__strings"]])
def test_an_unknown_module_needs_a_floor(tmp_path: Path, files: list[str]):
    sources = {file: "x = 1" for file in files}
    # One fault, where the module stands, however many import it.
    (fault,) = import_faults(write_package(tmp_path, **sources, cli="from tutorial_sae.helpers import x"))
    assert fault.startswith("helpers has no floor: give it one")


# -- (b) a light import stays light -----------------------------------------------------------------

# Named as well as caught by the general rule below: each of these costs a learner seconds.
HEAVY = {"transformer_lens", "transformers", "datasets", "ipywidgets", "matplotlib", "pandas"}

# The four that the core may load, each used a little, because torch loads more of itself at a first step.
ALLOWED = """
import torch, einops, jaxtyping, safetensors.torch
weight = torch.nn.Parameter(torch.ones(4, 4))
optimizer = torch.optim.Adam([weight])
einops.einsum(weight, weight, "a b, b c -> a c").square().sum().backward()
optimizer.step()
"""

TRAINING_STEP = """
import torch
from tutorial_sae.saes import BatchTopKSAE
torch.manual_seed(0)
sae = BatchTopKSAE(8, 32, k=4).train()
optimizer = torch.optim.Adam(sae.parameters())
sae.loss(torch.randn(64, 8)).total.backward()
optimizer.step()
assert sae.W_enc.grad.abs().sum() > 0
"""

# What the contract calls light, as far as it exists.
LIGHT_MODULES = ["saes", "sparse", "threshold", "training"]


def loaded_by(program: str) -> set[str]:
    """The top-level packages outside the standard library that a fresh interpreter has loaded."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", program + tail], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    names = set(json.loads(run.stdout.splitlines()[-1])) - set(sys.stdlib_module_names)
    return {name for name in names if not name.startswith("_")}


@cache
def allowed() -> set[str]:
    return loaded_by(ALLOWED) | {"tutorial_sae"}


def light_imports() -> str:
    there = [name for name in LIGHT_MODULES if list(PACKAGE.glob(f"{name}.py")) or (PACKAGE / name).is_dir()]
    return "\n".join(["import tutorial_sae", *(f"import tutorial_sae.{name}" for name in there)])


@pytest.mark.parametrize(
    "program",
    ["import tutorial_sae", light_imports(), TRAINING_STEP],
    ids=["package", "modules", "training step"],
)
def test_the_core_loads_torch_einops_jaxtyping_and_safetensors_only(program: str):
    loaded = loaded_by(program)
    assert "tutorial_sae" in loaded
    assert not loaded & HEAVY
    assert loaded <= allowed()


# -- (c) nothing that belongs to one machine --------------------------------------------------------

# Each pattern is written so that it does not match its own text.
FORBIDDEN = {
    "the host of a package registry": re.compile(
        r"pypi\.org|pythonhosted\.org|registry\.npmjs|registry\.yarnpkg|(?:deb|security)\.debian\.org"
        r"|conda\.anaconda\.org|(?:static|index)\.crates\.io|proxy\.golang\.org|repo1?\.maven\.(?:apache\.)?org"
    ),
    "an absolute path of somebody's machine": re.compile(
        r"(?<![\w./+-])/(?:home|root|Users|work|workspace)/[\w.]|\b[A-Za-z]:\\{1,2}Users\\"
    ),
}


def tracked_files(root: Path) -> list[Path]:
    """What git tracks or would track: all that is not ignored."""
    # Git trusts no checkout that belongs to another user, which a CI machine's may: reading names is safe.
    run = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if run.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of its files")
    paths = (root / name for name in run.stdout.decode("utf-8").split("\0") if name)
    return [path for path in paths if path.is_file()]


def personal_traces(files: list[Path]) -> list[str]:
    """Each place in these files that names a registry's host or a path of one machine."""
    faults = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        for what, pattern in FORBIDDEN.items():
            for match in pattern.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                faults.append(f"{file}:{line} holds {what}: {match.group()}")
    return faults


def test_no_file_names_a_registry_or_somebodys_machine():
    files = tracked_files(ROOT)
    assert ROOT / "pyproject.toml" in files
    assert not (faults := personal_traces(files)), "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "pieces",
    [
        ["see https://pypi", ".org/project/x"],
        ["--index-url https://files.python", "hosted.org/simple"],
        ["https://registry", ".npmjs.org/x"],
        ['File "/ho', "me/ann/x.py", '", line 1'],
        ["saved to /ro", "ot/runs"],
        ["(/Us", "ers/ann/notebooks)"],
        ["C:\\Us", "ers\\ann"],
    ],
)
def test_a_trace_is_found(tmp_path: Path, pieces: list[str]):
    # In pieces, so that this file holds none of them itself.
    file = tmp_path / "notes.md"
    file.write_text("fine\n" + "".join(pieces) + "\n", encoding="utf-8")
    (fault,) = personal_traces([file])
    assert ":2 holds" in fault


def test_harmless_text_is_no_trace(tmp_path: Path):
    file = tmp_path / "notes.md"
    file.write_text(
        "pip install torch; https://example.org/home/page; ~/runs; a tree's root/leaf; ../home/x; a/" + "work/b\n",
        encoding="utf-8",
    )
    assert personal_traces([file]) == []


# -- (d) the line budget ----------------------------------------------------------------------------


@cache
def count_lines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("count_lines", ROOT / ".ci" / "count_lines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # NamedTuple looks its own module up while the class is being made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_line_budget_is_kept():
    parts = count_lines().budget(PACKAGE)
    assert {part.name: part.limit for part in parts} == {
        "Python without checks/": 4300,
        "Python in checks/": 1500,
        "JavaScript": 600,
    }
    assert parts[0].lines > 0
    assert not [part for part in parts if part.lines > part.limit]


@pytest.mark.parametrize(
    ("path", "limit"), [("runtime.py", 4300), ("checks/one.py", 1500), ("widgets/explorer.js", 600)]
)
def test_one_line_above_a_limit_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, limit: int):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "cli.py").touch()
    file.write_text("x = 1\n" * limit)
    assert count_lines().main(tmp_path) == 0
    capsys.readouterr()
    file.write_text("x = 1\n" * (limit + 1))
    assert count_lines().main(tmp_path) == 1
    assert f"{limit + 1} of {limit}  <- 1 too many" in capsys.readouterr().out


def test_code_is_counted_and_explanations_are_not():
    source = '''"""A module
of two lines."""

import os  # 1

TEXT = """no docstring
but a value"""  # 2 and 3


def f(x):  # 4
    """A docstring."""
    # a comment
    return (  # 5
        x  # 6
    )  # 7
'''
    assert count_lines().code_lines(source) == 7


def test_an_empty_package_is_not_within_budget(tmp_path: Path):
    assert count_lines().main(tmp_path) == 1


# -- (e) one name, one version, one licence ---------------------------------------------------------


def test_citation_package_and_project_agree():
    import tutorial_sae

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == project["version"] == tutorial_sae.__version__
    assert citation["title"].startswith("tutorial_sae")
    assert project["name"] == "tutorial-sae"
    assert citation["license"] == project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Bussmann", "Leask", "Nanda"]
    assert paper["url"].endswith("/2412.06410")


def test_every_pin_lies_in_its_range():
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted[-1] == "-e ."
    pins = {}
    for line in wanted[:-1]:
        name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][\w.]*)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [Requirement(text) for text in project["dependencies"]]
    assert {range_.name for range_ in ranges} <= pins.keys()
    for range_ in ranges:
        assert range_.specifier.contains(pins[range_.name]), range_
        assert "==" not in str(range_.specifier), f"a range, not a pin: {range_}"
    # Colab has a front end of its own, and its ipywidgets must be allowed to stay.
    assert not {"jupyterlab", "nbval"} & {range_.name for range_ in ranges}
    by_name = {range_.name: range_.specifier for range_ in ranges}
    assert by_name["ipywidgets"].contains("7.7.1")
