"""The command line: `python -m tutorial_sae doctor | compare | train | evaluate | export | grade`.

Exit status 0 on success, 2 for bad arguments, 1 for a failure. A failure is a sentence that says what to do next;
`--debug` shows where it happened.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tutorial_sae.activations import ActivationStore
from tutorial_sae.interop import to_sae_lens
from tutorial_sae.launch import launch
from tutorial_sae.metrics import check_belongs, evaluate
from tutorial_sae.models import KNOWN, load_model
from tutorial_sae.planning import in_words, plan, recipes_table, this_machine
from tutorial_sae.report import write_latents
from tutorial_sae.runtime import (
    TutorialError,
    cache_dir,
    hardware,
    pick_device,
    pick_dtype,
    set_threads,
    unknown,
    versions,
    write_json,
)
from tutorial_sae.saes import load_sae
from tutorial_sae.text import EMBEDDED, Text, load_text
from tutorial_sae.threshold import calibrate_threshold
from tutorial_sae.training import CALIBRATION_BATCH, RECIPES, calibration_activations
from tutorial_sae.widgets.latents import latents_data

PACKAGES = ("torch", "transformer-lens", "transformers", "datasets", "gguf", "einops", "jaxtyping", "safetensors")
EXPORTS = ("html", "sae_lens")
PAGE_TOKENS = 50_000  # held-out activations from which a page of latents takes its contexts
COURSE_PACKAGES = ("jupyterlab", "ipywidgets", "anywidget", "matplotlib", "nbconvert", "nbval", "pytest")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        set_threads(options.threads)
        options.run(options)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept: run the same command again to go on", file=sys.stderr)
        return 1
    except Exception as error:
        if options.debug:
            raise
        expected = isinstance(error, TutorialError | ValueError | TypeError | OSError | RuntimeError)
        kind = "" if expected else f"{type(error).__name__}: "
        print(f"error: {kind}{error}", file=sys.stderr)
        if not expected:
            print("This looks like a fault of tutorial_sae: run again with --debug and report it.", file=sys.stderr)
        return 2 if isinstance(error, ValueError | TypeError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_sae", description="Sparse autoencoders: train, compare and look inside."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", help="CPU threads (default: TUTORIAL_SAE_THREADS, or all cores)")
    common.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(run=run)
        return added

    doctor = command("doctor", _doctor, "what this machine is, what runs on it, what is missing, what is cached")
    doctor.add_argument("--clear-cache", action="store_true", help="remove downloads, models and activations")

    compare = command("compare", _compare, "train the variants on real activations and compare them: the main job")
    compare.add_argument("--tier", default="cpu", help="cpu (default), or ci: a small run for checks")
    compare.add_argument("--all", action="store_true", help="Gated too, which takes a few minutes more")
    compare.add_argument("--seed", type=int, default=0, help="initial directions and order of batches (default 0)")
    compare.add_argument("--out", help="folder of the run (default runs/compare-<key of the settings>)")

    train = command("train", _train, "train one SAE by a recipe")
    train.add_argument("recipe", nargs="?", default="smollm2-135m", help="the model (default smollm2-135m)")
    train.add_argument("--list", action="store_true", help="show the recipes and stop")
    train.add_argument("--full", action="store_true", help="hours instead of minutes: see --list")
    train.add_argument("--sae", default="batchtopk", help="vanilla, gated, topk, batchtopk (default) or jumprelu")
    train.add_argument("--k", type=float, help="latents per token (TopK, BatchTopK), or the L0 aimed at (JumpReLU)")
    train.add_argument("--l1", type=float, help="coefficient of the L1 penalty (vanilla, Gated)")
    train.add_argument("--d-sae", type=int, help="number of latents")
    train.add_argument("--tokens", type=int, help="activations seen in training")
    train.add_argument("--batch-size", type=int, help="activations in a step, of all processes together")
    train.add_argument("--grid", help="paper: all the SAEs that the paper trained on this model, on one harvest")
    train.add_argument("--memory-gb", type=float, default=2.0, help="memory for activations (default 2)")
    train.add_argument("--text", help="another text: a file, a folder, or hub:OWNER/NAME (see load_text)")
    train.add_argument(
        "--revive", help="what is done for dead latents: none, auxk or resample (default: the variant's)"
    )
    train.add_argument("--checkpoint-seconds", type=float, help="between two checkpoints (default: the recipe's)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", help="folder of the run (default runs/<recipe>-<sae>-<key of the settings>)")
    train.add_argument("--resume", action="store_true", help="go on with an unfinished run in that folder")

    evaluate = command("evaluate", _evaluate, "measure a trained SAE on held-out text")
    evaluate.add_argument("folder", metavar="RUN", help="folder of a run, or of a saved SAE")
    evaluate.add_argument("--text", help="another text than that of the run")
    evaluate.add_argument("--cut", help="another cut than the SAE's own: row, batch or threshold")
    evaluate.add_argument("--calibrate", action="store_true", help="calibrate the threshold anew first, and save it")

    export = command("export", _export, "hand an SAE on: as a page of all its latents, or to SAELens")
    export.add_argument("folder", metavar="RUN", help="folder of a run, or of a saved SAE")
    export.add_argument("--to", required=True, help="html: latents.html, a page that needs no network; sae_lens")
    export.add_argument("out", metavar="DIR", help="folder to write into")

    for added in (train, evaluate, export):
        added.add_argument("--model", help="the same model from elsewhere: a folder, or hub:OWNER/NAME")

    grade = command("grade", _grade, "run students' notebooks and say who passed what")
    grade.add_argument("folder", metavar="FOLDER", help="notebooks, or a folder for each student with notebooks in it")
    grade.add_argument("--format", default="table", choices=("table", "csv", "json"))
    grade.add_argument("--out", help="file to write to (default: the screen)")
    grade.add_argument("--jobs", type=int, default=1, help="notebooks that run at a time (default 1)")
    grade.add_argument("--seconds", type=float, default=300.0, help="limit for one notebook (default 300)")
    grade.add_argument("--memory-gb", type=float, default=3.0, help="limit for one notebook (default 3)")
    return parser


# -- commands ------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> None:
    root = cache_dir()
    if options.clear_cache:
        freed = _size(root)
        for name in ("downloads", "models", "activations"):
            shutil.rmtree(root / name, ignore_errors=True)
        print(f"cleared {root}: {freed / 1e6:,.0f} MB freed")
        return
    machine, device = hardware(), pick_device()
    dtype = str(pick_dtype(None, device)).removeprefix("torch.")
    found = versions(*PACKAGES, *COURSE_PACKAGES)
    missing = [name for name, version in found.items() if version is None]
    print(f"machine    {machine['processor']}, {machine['cores']} cores ({machine['threads']} threads used)")
    print(f"memory     {machine['memory_gb']} GB")
    print(f"GPU        {machine['gpu'] or 'none: everything in the course runs without one'}")
    print(
        f"precision  {dtype} on {device}" + ("" if machine["fast_bf16"] else " (this hardware is not fast at bfloat16)")
    )
    print(f"python     {found.pop('python')} at {sys.executable}")
    print("packages   " + ", ".join(f"{name} {version}" for name, version in found.items() if version))
    print("missing    " + (", ".join(missing) + ": pip install -r requirements.txt" if missing else "nothing"))
    print(f"cache      {root}, {shutil.disk_usage(root).free / 1e9:,.0f} GB free on that disk")
    for name in ("downloads", "models", "activations"):
        print(f"           {name}: {_size(root / name) / 1e6:,.0f} MB")
    here = this_machine()
    for name, recipe in RECIPES.items():
        found = plan(name, recipe, recipe.config, machine=here)
        takes = f"{found.memory_gb:.1f} GB, disk {found.disk_gb:.1f} GB, about {in_words(found.hours)}"
        print(f"{'training' if name == 'smollm2-135m' else '':11}{name}: {takes}" + ", too large" * (not found.fits))
    print("           see train --list for more, and for settings that fit")
    ready = any((root / "models").glob("smollm2-135m-*/config.json"))
    print("embedded   " + ("ready, no network needed" if ready else "fetched at first use: about 120 MB, once"))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _compare(options: argparse.Namespace) -> None:
    from tutorial_sae.compare import compare

    compare(options.tier, seed=options.seed, out=options.out, every_variant=options.all)


def _train(options: argparse.Namespace) -> None:
    if options.list:
        print(recipes_table())
        return
    launch(options)


def _trained(options: argparse.Namespace) -> tuple[Any, Any]:
    """A saved SAE, and the model that it says it was trained on."""
    sae = load_sae(options.folder)
    name = options.model or sae.metadata["model"]
    if name is None:
        raise ValueError(f"{options.folder} does not say which model its SAE was trained on: name it with --model")
    if options.model is None and name not in KNOWN and not name.startswith("hub:"):
        raise ValueError(f"the SAE in {options.folder} was trained on a copy called {name!r}: add --model FOLDER")
    model = load_model(name)
    check_belongs(sae, model, sae.metadata["hook"])
    return sae.to(model.cfg.device), model


def _text(sae: Any, split: str, source: str | None = None) -> Text:
    """A split of the text that an SAE was trained on."""
    source = source or str(((sae.metadata["data"] or {}).get("text") or ["embedded"])[0])
    return load_text(source, split=split, stream=None if source in EMBEDDED else True)


def _evaluate(options: argparse.Namespace) -> None:
    sae, model = _trained(options)
    if options.calibrate:
        limit = (sae.metadata["mask"] or {}).get("norm_limit")
        data = calibration_activations(model, sae.metadata["hook"], limit, text=_text(sae, "calibration", options.text))
        print("calibrated:", calibrate_threshold(sae, data, batch_size=CALIBRATION_BATCH))
        sae.save(options.folder)
    result = evaluate(sae, model, _text(sae, "heldout", options.text), cut=options.cut).numbers()
    write_json(Path(options.folder) / "eval.json", result)
    print(json.dumps(result, indent=1))


def _export(options: argparse.Namespace) -> None:
    if options.to not in EXPORTS:
        raise unknown("format", options.to, EXPORTS)
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"DIR {options.out} is a file: name a folder")
    if options.to == "sae_lens":
        print(f"{to_sae_lens(load_sae(options.folder), Path(options.out))}  (sae_lens.SAE.load_from_disk reads it)")
        return
    sae, model = _trained(options)
    text, limit = _text(sae, "heldout"), (sae.metadata["mask"] or {}).get("norm_limit")
    store = ActivationStore(model, text, sae.metadata["hook"], tokens=PAGE_TOKENS, norm_limit=limit)
    print(f"{write_latents(latents_data(model, sae, store), Path(options.out))}  (open it in a browser)")


def _grade(options: argparse.Namespace) -> None:
    from tutorial_sae.checks.grade import grade

    if options.out and not Path(options.out).resolve().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no such folder to write into")
    rows = []
    for row in grade(options.folder, options.seconds, options.memory_gb, options.jobs):
        rows.append(row)
        print(f"graded {row['notebook']}", file=sys.stderr)
    with open(options.out, "w", encoding="utf-8") if options.out else contextlib.nullcontext(sys.stdout) as out:
        if options.format == "json":
            print(json.dumps(rows, indent=1, ensure_ascii=False), file=out)
        else:
            (_marks_csv if options.format == "csv" else _marks_table)(rows, out)


def _marks_csv(rows: list[dict[str, Any]], out: Any) -> None:
    """A line for each exercise of each notebook; a notebook that has none gets one too."""
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["student", "notebook", "exercise", "title", "core", "outcome", "note"])
    for row in rows:
        for number, e in (row["exercises"] or {"": {}}).items():
            of_it = (e.get("title"), e.get("core"), e.get("outcome"))
            table.writerow([row["student"], row["notebook"], number, *of_it, row["note"]])


def _marks_table(rows: list[dict[str, Any]], out: Any) -> None:
    signs = {"passed": "x", "not yet": "-", "not attempted": "."}
    lines: list[tuple[str, ...]] = [("student", "notebook", "core", "all", "exercises")]
    for row in rows:
        marks = [(e["core"], signs[e["outcome"]]) for e in row["exercises"].values()]
        of_core, of_all = ([mark for core, mark in marks if core or bonus] for bonus in (False, True))
        counts = (f"{found.count('x')} of {len(found)}" for found in (of_core, of_all))
        text = "".join(mark if core else f"({mark})" for core, mark in marks)
        lines.append((row["student"], row["notebook"], *counts, text + "  " * bool(row["note"]) + row["note"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip(), file=out)
    print("Exercises in order of number: x passed, - not yet, . not attempted; bonus exercises in brackets.", file=out)
