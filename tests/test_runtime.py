"""The ground floor: pinned downloads (by real pip, from a folder instead of an index), files, seeds, names."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tutorial_sae import runtime
from tutorial_sae.runtime import TutorialError, Wheel, atomic, cache_dir, digest, fetch, generator, unknown

ROOT = Path(__file__).resolve().parent.parent
CONTENT = b"a pinned file\n" * 10_000
WRONG = "0" * 64

# -- pinned downloads -------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A folder that pip takes for the whole index, holding one tiny wheel; and the pin of that wheel."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    file = folder / "tinything-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tinything/data.txt", CONTENT)
        info = "tinything-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel("tinything", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size)


def pinned(wheel: Wheel, **changes: Any) -> Wheel:
    return Wheel(**{**vars(wheel), **changes})


def files_below(folder: Path) -> set[str]:
    """Names of all files but the locks, which stay."""
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "pip" else real(name, *more))


def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("nothing was to be downloaded")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_a_wheel_is_fetched_whole_and_then_needs_no_pip(
    index: Wheel, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = fetch(index)
    assert path.read_bytes() == (tmp_path / "index" / "tinything-1.0-py3-none-any.whl").read_bytes()
    assert files_below(own_cache) == {path.name}
    no_pip(monkeypatch)
    no_processes(monkeypatch)
    assert fetch(index) == path


def test_one_member_is_taken_out_of_a_wheel(index: Wheel, own_cache: Path):
    path = fetch(pinned(index, member="tinything/data.txt"))
    assert path.read_bytes() == CONTENT
    assert path.name == "data.txt"
    assert files_below(own_cache) == {"data.txt"}


def test_a_file_with_another_hash_is_refused_and_removed(index: Wheel, own_cache: Path):
    other = pinned(index, sha256=WRONG)
    with pytest.raises(TutorialError) as caught:
        fetch(other)
    assert index.sha256 in str(caught.value)
    assert WRONG in str(caught.value)
    assert not other.path.exists()
    assert files_below(own_cache) == set()


def test_without_pip_the_error_says_how_to_get_it(index: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    no_pip(monkeypatch)
    no_processes(monkeypatch)
    with pytest.raises(TutorialError, match="ensurepip"):
        fetch(index)
    assert files_below(own_cache) == set()


def test_without_an_index_the_error_says_what_to_check_and_the_next_try_succeeds(
    index: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as offline:
        offline.delenv("PIP_NO_INDEX")
        offline.delenv("PIP_FIND_LINKS")
        offline.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
        offline.setenv("PIP_RETRIES", "0")
        with pytest.raises(TutorialError, match=r"could not download tinything==1\.0 .*network.*pip config"):
            fetch(index)
    assert files_below(own_cache) == set()
    assert fetch(index).exists()


# A process that loads runtime.py alone: PyTorch, which takes seconds, has no part in a download.
RUNTIME = """
import os, sys, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["tutorial_sae"] = types.ModuleType("tutorial_sae")
sys.modules["tutorial_sae"].__path__ = ["tutorial_sae"]
from tutorial_sae import runtime
"""


def python(program: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", RUNTIME + program]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_at_once_both_get_the_whole_file(index: Wheel, own_cache: Path):
    program = f"print('ready', flush=True); sys.stdin.readline()\nprint(runtime.fetch(runtime.Wheel(**{vars(index)})))"
    both = [python(program), python(program)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(index.path)}
    assert runtime.file_sha256(index.path) == index.sha256
    assert files_below(own_cache) == {index.path.name}


def test_whoever_comes_second_says_so_and_waits(tmp_path: Path):
    file, done = tmp_path / "work" / ".lock", tmp_path / "done"
    with runtime.lock(file):
        second = python(
            f"with runtime.lock(runtime.Path({str(file)!r})):\n    print('done:', os.path.exists({str(done)!r}))"
        )
        assert second.stderr is not None
        assert "another process is at work" in second.stderr.readline()
        done.touch()
    assert second.communicate(timeout=300)[0] == "done: True\n"


def test_what_a_killed_download_leaves_is_cleared_by_the_next(index: Wheel, own_cache: Path):
    killed = python(f"runtime.file_sha256 = lambda path: os._exit(9)\nruntime.fetch(runtime.Wheel(**{vars(index)}))")
    _, err = killed.communicate(timeout=300)
    assert killed.returncode == 9, err
    left = files_below(own_cache)
    assert left
    assert index.path.name not in left
    assert fetch(index).exists()
    assert files_below(own_cache) == {index.path.name}


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        raise error

    return call


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_while_a_file_is_written_leaves_nothing(
    index: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "copyfileobj", raising(DISK_FULL))
    with pytest.raises(TutorialError, match=r"disk is full.*TUTORIAL_SAE_CACHE"):
        fetch(pinned(index, member="tinything/data.txt"))
    assert files_below(own_cache) == set()


def test_a_disk_that_fills_inside_pip_is_told_as_such(index: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(TutorialError, match="disk filled up"):
        fetch(index)


def test_a_disk_that_is_too_small_is_refused_before_the_download(index: Wheel, monkeypatch: pytest.MonkeyPatch):
    no_processes(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=index.size))
    with pytest.raises(TutorialError, match=r"tinything==1\.0 needs .*free some space"):
        fetch(index)


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "deeper", "deeper/still"])
@pytest.mark.parametrize("use", [cache_dir, lambda: cache_dir("models")], ids=["itself", "a folder in it"])
def test_a_cache_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, use: Callable[[], Path]
):
    # A file in the way stops root too, whom permissions do not.
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TUTORIAL_SAE_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(TutorialError, match=r"cannot write to .*set TUTORIAL_SAE_CACHE"):
        use()


@pytest.mark.parametrize("target", ["file/x.json", "file/deeper/x.json"])
def test_writing_below_a_file_is_a_sentence(tmp_path: Path, target: str):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TutorialError, match="cannot write to "):
        runtime.write_json(tmp_path / target, {})


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUTORIAL_SAE_CACHE", str(tmp_path / "here"))
    assert cache_dir("a", "b") == tmp_path / "here" / "a" / "b"
    assert (tmp_path / "here" / "a" / "b").is_dir()
    monkeypatch.delenv("TUTORIAL_SAE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "tutorial_sae"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: BaseException):
    path = tmp_path / "new" / "x.txt"

    def write(text: str, then: Callable[[], Any]) -> None:
        with atomic(path) as partial:
            partial.write_text(text)
            then()

    with pytest.raises(type(error)):
        write("half", raising(error))
    assert list(path.parent.iterdir()) == []
    write("whole", lambda: None)
    with pytest.raises(type(error)):
        write("half", raising(error))
    assert [file.read_text() for file in path.parent.iterdir()] == ["whole"]


def test_json_is_readable_as_written(tmp_path: Path):
    value = {"name": "café", "numbers": [1, 2.5, None]}
    runtime.write_json(tmp_path / "a" / "x.json", value)
    assert json.loads((tmp_path / "a" / "x.json").read_text(encoding="utf-8")) == value


def test_other_errors_pass_through_unchanged(tmp_path: Path):
    with pytest.raises(OSError, match="something else") as caught, runtime.writing(tmp_path):
        raise OSError(errno.EIO, "something else")
    assert not isinstance(caught.value, TutorialError)


# -- seeds, digests, names --------------------------------------------------------------------------


def draw(source: torch.Generator) -> list[int]:
    return torch.randint(1 << 30, (8,), generator=source).tolist()


def test_a_generator_depends_on_seed_and_labels_only():
    before = torch.get_rng_state()
    again = draw(generator(0, "batches", 1))
    torch.manual_seed(5)
    assert draw(generator(0, "batches", 1)) == again
    torch.set_rng_state(before)
    labels = [(0, "batches", 1), (0, "batches", 2), (0, "sample", 1), (1, "batches", 1), (0,), (10, "1")]
    assert len({tuple(draw(generator(*label))) for label in labels}) == len(labels)


def test_one_use_of_chance_never_shifts_another():
    a, b = generator(0, "a"), generator(0, "b")
    alone = draw(generator(0, "b"))
    state = torch.get_rng_state()
    draw(a)
    assert draw(b) == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_digests_are_the_same_on_every_machine():
    # The SHA-256 of the text {"a": [1, 2.5, null, "\u00e4"], "b": {"c": true}}, by another program.
    expected = "8dd73d14ce0875d5638b4a24856c2c825047f7ffb8e0345f54874c94017544c0"
    assert digest({"a": [1, 2.5, None, "ä"], "b": {"c": True}}) == expected
    assert digest({"b": {"c": True}, "a": (1, 2.5, None, "ä")}) == expected
    assert digest({"a": [1, 2.5, None, "a"], "b": {"c": True}}) != expected


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The test vector of FIPS 180.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert runtime.file_sha256(tmp_path / "abc") == expected


@pytest.mark.parametrize(("got", "offered"), [("gpt-2", "gpt2"), ("smollm", "smollm2-135m"), ("gemma", "gemma-2-2b")])
def test_an_unknown_name_gets_the_nearest_known_one(got: str, offered: str):
    error = unknown("model", got, iter(["gemma-2-2b", "gpt2", "smollm2-135m"]))
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"unknown model {got!r}: did you mean {offered!r}")


def test_a_name_near_to_none_gets_them_all():
    assert str(unknown("split", "zzz", ["train", "heldout"])) == (
        "unknown split 'zzz': did you mean 'train', 'heldout'?"
    )


# -- this machine -----------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TUTORIAL_SAE_THREADS", raising=False)
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_come_from_the_argument_then_the_variable(threads: int, monkeypatch: pytest.MonkeyPatch):
    assert runtime.set_threads() == threads
    monkeypatch.setenv("TUTORIAL_SAE_THREADS", "3")
    assert runtime.set_threads() == torch.get_num_threads() == 3
    assert runtime.set_threads(2) == torch.get_num_threads() == 2


@pytest.mark.parametrize("count", ["0", "-1", "two", "", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(threads: int, monkeypatch: pytest.MonkeyPatch, count: str):
    monkeypatch.setenv("TUTORIAL_SAE_THREADS", count)
    with pytest.raises(ValueError, match=r"not a number of threads.*whole number"):
        runtime.set_threads()
    assert torch.get_num_threads() == threads


def test_device_and_precision_asked_for_are_given():
    cpu = torch.device("cpu")
    assert runtime.pick_device("cpu") == cpu
    assert runtime.pick_dtype(torch.float16, cpu) == torch.float16
    assert runtime.pick_dtype(None, cpu) in {torch.float32, torch.bfloat16}


def test_the_machine_is_described_in_json():
    described = json.loads(json.dumps(runtime.hardware()))
    assert described["cores"] == os.cpu_count()
    assert described["threads"] == torch.get_num_threads()


def test_progress_is_silent_inside_a_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run() -> str:
        with runtime.progress(10, "counting") as bar:
            bar.update(10)
        return capsys.readouterr().err

    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert "counting" in run()
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())  # type: ignore[arg-type]
    assert run() == ""


def test_a_full_disk_is_named_although_safetensors_hides_it(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(TutorialError, match="disk is full"):
        runtime.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert not list(tmp_path.iterdir())
