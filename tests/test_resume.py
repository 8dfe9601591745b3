"""Runs that are killed at any moment, and go on as if nothing had happened: the whole way of the recipe, offline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import local_documents

HERE = Path(__file__).resolve().parent
MOMENTS = [
    "the first harvest",
    "a later harvest",
    "a step",
    "a later step",
    "the first checkpoint",
    "the name of a checkpoint",
    "the metrics beside it",
    "calibration",
    "the end",
]


def write_parquet(path: Path, documents: list[str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=50)
    return path


@pytest.fixture(scope="module")
def killed(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    text = write_parquet(folder / "text.parquet", local_documents(150))
    command = [sys.executable, str(HERE / "kill_program.py"), str(gpt2_folder), str(text), str(folder)]
    settings = {"TUTORIAL_SAE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_this_moment_resumes_to_the_same_sae(killed: dict[str, Any], moment: str):
    assert killed[moment] == {"killed": -signal.SIGKILL, "bad": [], "again": 0, "same": True}


def test_a_run_killed_again_and_again_at_random_resumes_to_the_same_sae(killed: dict[str, Any]):
    found = killed["random"]
    assert -signal.SIGKILL in found["killed"]
    assert not found["bad"]
    assert found["same"]
    assert not found["left"], "nothing half-written stays behind"
