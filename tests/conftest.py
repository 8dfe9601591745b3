"""Rules for every test: nothing is looked up on a hub, and with TUTORIAL_SAE_NO_SKIP=1 nothing is skipped.

A skipped test proves nothing, and a suite of skips is green. CI therefore turns each skip into a failure,
also that of a whole module. One reason is accepted, because no test can mend it: one that starts with "GPU".
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Before any test imports transformers or huggingface_hub, which read it once.
os.environ["HF_HUB_OFFLINE"] = "1"


def fail_if_skipped(report: Any) -> None:
    if os.environ.get("TUTORIAL_SAE_NO_SKIP") != "1":
        return
    # An expected failure also arrives as "skipped", but that test did run.
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    path, line, message = report.longrepr
    reason = message.removeprefix("Skipped: ")
    if reason.startswith("GPU"):
        return
    report.outcome = "failed"
    report.longrepr = f"{path}:{line}: skipped, which TUTORIAL_SAE_NO_SKIP=1 forbids: {reason}"


# tryfirst puts these wrappers outermost, so they see what pytest's own handling of skips has decided.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    fail_if_skipped(report)
    return report


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes ten seconds or more; leave out with -m 'not slow'")


# -- small models and a corpus, made once a session ------------------------------------------------------
# small_models is imported inside, because this file must also load where that one is not (test_conftest.py).


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_models import save_gpt2

    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "tiny-gpt2")


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_models import save_gemma2

    return save_gemma2(tmp_path_factory.mktemp("gemma") / "tiny-gemma-2")


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Any:
    """GPT-2 with random weights, in float32. Shared: leave it as it was."""
    import torch

    from tutorial_sae import load_model

    return load_model(gpt2_folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def gemma(gemma_folder: Path) -> Any:
    """Gemma 2 with random weights, in float32. Shared: leave it as it was."""
    import torch

    from tutorial_sae import load_model

    return load_model(gemma_folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The embedded model, in float32. Shared: leave it as it was."""
    import torch

    from tutorial_sae import load_model

    return load_model("smollm2-135m", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of sixty documents."""
    from small_models import local_documents, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("corpus") / "notes.jsonl", local_documents())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for one test; what the session shares stays in the real one."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TUTORIAL_SAE_CACHE", str(folder))
    return folder
