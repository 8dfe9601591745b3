"""Rules for every test: nothing is looked up on a hub, and with TUTORIAL_SAE_NO_SKIP=1 nothing is skipped.

A skipped test proves nothing, and a suite of skips is green. CI therefore turns each skip into a failure,
also that of a whole module. One reason is accepted, because no test can mend it: one that starts with "GPU".
"""

from __future__ import annotations

import os
from collections.abc import Generator
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
