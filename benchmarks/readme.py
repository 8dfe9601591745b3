"""`python -m benchmarks.readme`: put the committed results into the README, and draw its figure.

To renew them run `python -m` of the modules `benchmarks.panels`, `benchmarks.calibration`, `benchmarks.step`,
`benchmarks.scaling` and `benchmarks.end_to_end`, then this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import calibration, end_to_end, panels, scaling, step
from tutorial_sae.plots import NAMES
from tutorial_sae.pretrained import manifest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by `python -m benchmarks.readme` -->", "<!-- end of results -->"


def true_sizes() -> str:
    """Planned and measured peaks of memory at the recipes' true sizes."""
    lines = ["| run, on a CPU, random weights | planned, GB | peak, GB | seconds |", "|---|---:|---:|---:|"]
    results = json.loads((RESULTS / "true_size.json").read_text(encoding="utf-8"))
    for name, what in (("gpt2", "GPT-2 Small, 768/12288"), ("gemma-2-2b", "Gemma 2 2B up to layer 12, 2304/16384")):
        for command in results[name]["commands"]:
            ends = {-9: "killed (SIGKILL)", 1: "resumed, stopped (SIGTERM)"}
            does = command["command"].split()[0]
            if does == "train":
                does = ends.get(command["exit"], "resumed to the end" if name == "gpt2" else "5 steps of 1024")
            planned = f"{command['planned_gb']:.1f}" if command["planned_gb"] else ""
            lines.append(f"| {what}: {does} | {planned} | {command['peak_gb']:.2f} | {command['seconds']:.0f} |")
    return "\n".join(lines)


def sae_lens() -> str:
    found = json.loads((RESULTS / "sae_lens.json").read_text(encoding="utf-8"))
    rows = found["saes"].values()
    differ, active = (sum(row[key] for row in rows) for key in ("active_in_one_only", "active"))
    return (
        f"SAELens {found['versions']['sae-lens']}, given the export of the shipped BatchTopK and JumpReLU SAEs and\n"
        f"{found['tokens']:,} held-out activations, keeps the same {active:,} entries, but for {differ}."
    )


def load() -> dict[str, Any]:
    return json.loads(panels.RESULTS.read_text(encoding="utf-8"))


def shipped() -> str:
    """The SAEs that come with the project, from their manifest."""
    lines = [
        "| SAE | activations seen | cut | L0 (1 %, 99 %) | FVU | CE increase | dead |",
        "|---|---:|---|" + "---:|" * 4,
    ]
    for variant, made in manifest()["saes"].items():
        found = made["heldout"]
        lines.append(
            f"| {NAMES[variant]} | {made['tokens_seen'] / 1e6:.0f} million | {found['cut']} | {found['l0']:.1f} "
            f"({found['l0_p1']:.0f}, {found['l0_p99']:.0f}) | {found['fvu']:.4f} | {found['ce_increase']:.3f} | "
            f"{found['dead']:.1%} |"
        )
    return "\n".join(lines)


def speed() -> str:
    """What a training step costs, and what a user waits for."""
    steps, growth, whole = (
        json.loads(module.RESULTS.read_text(encoding="utf-8")) for module in (step, scaling, end_to_end)
    )
    hardware = steps["meta"]["hardware"]
    grown = {row["case"]: row["ratio"] for row in growth["rows"] if row["variant"] == "batchtopk"}
    doubled = ", ".join(f"{name} {ratio:.1f}" for name, ratio in grown.items() if name != "base")
    return f"""## Speed

Only a few entries in a thousand survive a cut, so training works on those (`sparse.py`); the encoder's product is the
one thing that needs them all. A whole training step, forward, loss, backward and update, on the same batch as the
reference code of the paper (rewritten) and as other libraries take it; {hardware["processor"]}, {hardware["threads"]}
threads, medians over {steps["meta"]["rounds"]} rounds in which all take turns. Speed against the reference, in brackets
milliseconds and peak memory in MB:

{step.table(steps).split(chr(10) * 2)[0]}

The floor is the encoder's product alone. Doubling one size at a time makes a BatchTopK step so many times longer:
{doubled}.

Speed is worth nothing if training is worse, so: seconds of training until the held-out error is down to what the least
good contender ends with, {whole["meta"]["tokens_seen"]:,} activations, width {whole["meta"]["size"]["d_sae"]}:

{end_to_end.table(whole).split(chr(10) * 2)[0]}

The lowest error after equally many steps is not always ours: see the column of final FVU, and try `lr` for yourself.
Other work ran on the machine while this was measured; ratios are of contenders that took turns.

"""


def section() -> str:
    """The README's results, from the committed files and from nothing else."""
    measured = load()
    setting, hardware = measured["setting"], measured["meta"]["hardware"]
    found = manifest()["saes"]["batchtopk"]["heldout"]
    calibrated = json.loads(calibration.RESULTS.read_text(encoding="utf-8"))
    trained_on, calibrated_on = (calibrated["meta"][key] for key in ("tokens_seen", "tokens_calibration"))
    return f"""{START}

## The SAEs that come with the project

`load_pretrained("batchtopk")` and its siblings: activations after block 15 of the embedded model, 2304 latents, trained
on 3 million distinct activations. Measured on {found["tokens_fvu"]:,} held-out tokens (CE on {found["tokens_ce"]:,}):

{shipped()}

They were not all trained for equally long, so the table compares what you get, not the methods. How each was made
(command, seed, hardware, figures, SHA-256) is in `tutorial_sae/pretrained/manifest.json`.

{speed()}## At true sizes

The recipes as they are, but for weights drawn at random: 100 steps of 1024 activations for GPT-2, a local parquet file
as text; {hardware["processor"]}, 2 threads. `python -m benchmarks.true_size` measures it.

{true_sizes()}

{sae_lens()}

## What it measures

The panels of the paper's figures, on {setting["model_note"]}, `{setting["hook"]}`: every SAE saw the same
{setting["tokens_distinct"]:,} activations, {setting["tokens_seen"]:,} with repeats, in three orders from three seeds.
Held-out: FVU and L0 on {setting["tokens_fvu"]:,} tokens, CE on {setting["tokens_ce"]:,}. {hardware["processor"]},
{hardware["threads"]} thread; `python -m benchmarks.panels` makes them anew. Means over the seeds, in brackets the
largest less the smallest:

{panels.table(measured["rows"])}

![FVU and CE increase against width and against L0, a point for each SAE and seed](benchmarks/results/panels.png)

L0 is the mean number of latents per token, FVU the fraction of variance left unexplained, CE increase what the language
model loses when the reconstruction is put in place of its activations (nats per token), dead the share of latents that
never fired on the held-out text. Lower is better, at equal L0. Notebook 07 holds these numbers against the paper's
claims, one by one.

Does one number θ keep k latents per token on text that it was not calibrated on? Held-out L0, seeds 0 / 1, of
BatchTopK SAEs trained on {trained_on:,} activations and calibrated on {calibrated_on:,}, in batches of several sizes:

{calibration.table(calibrated["rows"])}

`batch_min_mean` is the paper's estimator, and the default; with small batches it lies too low here, and lets more
latents through. `ema` without its bias correction is on its way up from 0 still. `learned` gives each latent a
threshold of its own.

One small model in a short run: at other widths, budgets and lengths of training the order can change (in the shortest
runs TopK leads), and nothing here is measured on GPT-2 or Gemma 2.

{END}"""


def main() -> None:
    panels.figure(load()).savefig(RESULTS / "panels.png", dpi=110)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    readme.write_text(before + section() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
