"""What the lessons claim, measured: `python -m benchmarks.lessons.nb04` writes `results/lessons/nb04.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutorial_sae.runtime import hardware, versions, write_json

RESULTS = Path(__file__).parent.parent / "results" / "lessons"


def write(name: str, results: dict[str, Any]) -> None:
    """Write a lesson's results, with the machine and the versions that they were measured with."""
    meta = {"hardware": hardware(), "versions": versions("tutorial-sae", "torch", "transformer-lens")}
    write_json(RESULTS / f"{name}.json", {"meta": meta} | results)
    print(f"wrote {RESULTS.name}/{name}.json")
