"""From a recipe to a trained SAE, or to the paper's whole grid: what `python -m tutorial_sae train` does.

plan, refuse what cannot fit -> load the model -> harvest and train, all SAEs on one harvest -> measure a grid
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tutorial_sae import ranks
from tutorial_sae.activations import ActivationStore
from tutorial_sae.metrics import Heldout, evaluate
from tutorial_sae.models import KNOWN, load_model
from tutorial_sae.planning import plan
from tutorial_sae.report import write_grid
from tutorial_sae.runtime import digest, hardware, unknown, versions
from tutorial_sae.saes import VARIANTS
from tutorial_sae.text import Text, load_text
from tutorial_sae.training import (
    FULL,
    RECIPES,
    Recipe,
    TrainConfig,
    TrainResult,
    calibration_activations,
    train_together,
)

GRID_TOKENS = 60_000  # held-out activations on which the SAEs of a grid are measured


class Job(NamedTuple):
    """One SAE to train."""

    variant: str
    d_sae: int
    k: int | float
    settings: dict[str, Any]
    out: Path


def launch(options: argparse.Namespace) -> None:
    """Train what the options of `train` ask for (`python -m tutorial_sae train --help`), under torchrun too.

    Raises `ValueError` for bad options and for a folder with an unfinished run, `TutorialError` for a run that cannot
    fit, before anything is loaded.
    """
    if options.recipe not in RECIPES:
        raise unknown("recipe", options.recipe, RECIPES)
    if options.sae not in VARIANTS:
        raise unknown("SAE", options.sae, VARIANTS)
    if options.grid not in (None, "paper"):
        raise unknown("grid", options.grid, ["paper"])
    recipe = (FULL if options.full else RECIPES)[options.recipe]
    names = ("tokens", "batch_size", "checkpoint_seconds", "revive")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = replace(recipe.config, **given)
    config.check()
    k = recipe.k if options.k is None else options.k
    wanted: Any = [(options.sae, recipe.d_sae if options.d_sae is None else options.d_sae, k)]
    if options.grid:
        wanted = recipe.grid
        if not wanted:
            raise ValueError(f"the paper trained nothing on {options.recipe}: --grid suits gpt2 and gemma-2-2b")
    settings = [recipe.settings(variant, k=k, l1=options.l1) for variant, _, k in wanted]
    key = digest([options.recipe, options.full, wanted, settings, asdict(config), options.text, options.seed])[:8]
    out = Path(options.out or Path("runs") / f"{options.recipe}-{options.grid or options.sae}-{key}")
    jobs = [
        Job(variant, d_sae, k, chosen, out / f"{variant}-{d_sae}-{k:g}" if options.grid else out)
        for (variant, d_sae, k), chosen in zip(wanted, settings, strict=True)
    ]
    if any((job.out / "checkpoint" / "state.safetensors").exists() for job in jobs) and not options.resume:
        raise ValueError(f"{out} holds an unfinished run: add --resume to go on with it, or choose another --out")
    for job in jobs:
        VARIANTS[job.variant](1, job.d_sae, **job.settings)  # bad settings are refused before anything is loaded
    with ranks.joined():
        _run(options, recipe, config, jobs, out)


def _run(options: argparse.Namespace, recipe: Recipe, config: TrainConfig, jobs: list[Job], out: Path) -> None:
    widths = [job.d_sae for job in jobs]
    needed = plan(options.recipe, recipe, config, widths, options.memory_gb, source=options.model)
    needed.check()
    if ranks.rank() == 0:
        print(needed, file=sys.stderr, flush=True)
    model = load_model(options.model or options.recipe)

    def text(split: str) -> Text:
        return load_text(options.text or recipe.text, split=split, stream=recipe.stream or None)

    hook, sizes = KNOWN[options.recipe].hook, {"tokens": min(config.tokens, recipe.harvest), "seed": options.seed}
    store = ActivationStore(model, text("train"), hook, stream=recipe.stream, memory_gb=options.memory_gb, **sizes)
    calibration = None
    if any(job.variant == "batchtopk" for job in jobs):
        calibration = calibration_activations(model, hook, store.norm_limit, text=text("calibration"))
    saes = [VARIANTS[job.variant](store.d_in, job.d_sae, seed=options.seed, **job.settings) for job in jobs]
    saes = [sae.to(model.cfg.device) for sae in saes]
    results = train_together(saes, store, config, outs=[job.out for job in jobs], calibration=calibration)
    if ranks.rank() > 0:
        return
    if options.grid:
        print(f"{write_grid(_measured(options.recipe, store, text('heldout'), jobs, results), out)}  (open it)")
        return
    print(f"trained {results[0].sae}")
    print(f"{results[0].seconds:.0f} s, {results[0].tokens_per_second:,.0f} tokens/s; saved in {out}")
    print(f"next: python -m tutorial_sae evaluate {out}" + (f" --model {options.model}" if options.model else ""))


def _measured(
    recipe: str, store: ActivationStore, text: Text, jobs: list[Job], results: list[TrainResult]
) -> dict[str, Any]:
    """What `grid.html` shows."""
    sizes = {"tokens": GRID_TOKENS, "ce_tokens": GRID_TOKENS // 5}
    heldout = Heldout(store.model, text, store.hook, norm_limit=store.norm_limit, **sizes)
    rows = []
    for job, result in zip(jobs, results, strict=True):
        numbers = evaluate(result.sae, store.model, heldout).numbers()
        row = {"variant": job.variant, "d_sae": job.d_sae, "k": job.k, "train_seconds": result.seconds}
        rows.append(row | numbers)
    meta = {
        "recipe": recipe,
        "model": store.card.name,
        "hook": store.hook,
        "text": store.text.source,
        "seed": store.seed,
        "tokens_seen": results[0].sae.metadata["tokens"],
        "tokens_fvu": rows[0]["tokens_fvu"],
        "tokens_ce": rows[0]["tokens_ce"],
        "hardware": hardware(),
        "versions": versions("tutorial-sae", "torch", "transformer-lens"),
    }
    return {"meta": meta, "rows": rows}
