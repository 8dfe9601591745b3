"""The main job: measure the shipped SAEs on held-out text, train the variants on one stream of activations, measure
those too, show what came out.

Every step leaves its result in the folder of the run, so that a run that was stopped goes on where it was, and one
that is done only prints its table again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tutorial_sae import pretrained
from tutorial_sae.activations import ActivationStore
from tutorial_sae.latents import Latents, kind_of
from tutorial_sae.metrics import PCA, EvalResult, Heldout, evaluate, reconstruction
from tutorial_sae.models import EMBEDDED_WHEEL, load_model
from tutorial_sae.report import cross_table, results_table, write_report
from tutorial_sae.runtime import TutorialError, digest, generator, hardware, unknown, versions, write_json
from tutorial_sae.saes import SAE, VARIANTS
from tutorial_sae.text import load_text
from tutorial_sae.training import SHORT, Recipe, TrainConfig, TrainResult, calibration_activations, train


class Tier(NamedTuple):
    """How large a comparison is."""

    recipe: Recipe
    hook: str
    calibration: int  # activations, from documents of their own
    tokens_fvu: int
    tokens_ce: int
    shipped: bool = False  # whether the shipped SAEs belong to this hook point, and are measured too


SMALL = Recipe(
    d_sae=1152,
    k=16,
    l1={"vanilla": 1.5, "gated": 1.5},
    harvest=24_000,
    config=TrainConfig(tokens=60_000, batch_size=512),
)
TIERS = {
    "cpu": Tier(
        SHORT, "blocks.15.hook_resid_post", 16 * 1024, tokens_fvu=pretrained.SLICE, tokens_ce=4_000, shipped=True
    ),
    # for checks: small enough for CI, too small to quote
    "ci": Tier(SMALL, "blocks.6.hook_resid_post", 4_096, tokens_fvu=6_000, tokens_ce=1_500),
}
# the cuts each SAE is measured with; the first is its own
CUTS = {
    "vanilla": ("own",),
    "gated": ("own",),
    "topk": ("row", "batch"),
    "batchtopk": ("threshold", "row", "batch"),
    "jumprelu": ("own",),
}
EXTRA = ("gated",)  # with --all only
EXAMPLE_LATENTS = 12
MEASURED = (
    *("l0", "l0_p1", "l0_p50", "l0_p99", "fvu", "ce_increase"),
    *("loss_recovered_zero", "loss_recovered_mean", "dead"),
)


class Comparison:
    """One comparison and its folder. What is costly is made when first needed, and not at all when files have it."""

    def __init__(self, tier: str = "cpu", *, seed: int = 0, out: str | Path | None = None, every_variant: bool = False):
        if tier not in TIERS:
            raise unknown("tier", tier, TIERS)
        self.name, self.tier, self.seed = tier, TIERS[tier], seed
        self.recipe = self.tier.recipe
        self.variants = [variant for variant in CUTS if every_variant or variant not in EXTRA]
        shipped = pretrained.manifest() if self.tier.shipped else None
        self.key = digest([tier, seed, self.tier, EMBEDDED_WHEEL.sha256, load_text().identity, shipped])[:8]
        self.folder = Path(out) if out else Path("runs") / f"compare-{self.key}"
        mark = self.folder / "compare.json"
        if mark.exists() and self.read(mark).get("key") != self.key:
            raise ValueError(
                f"{self.folder} holds a comparison with other settings: choose another --out, or remove it"
            )
        write_json(mark, {"key": self.key, "tier": tier, "seed": seed})

    def run(self) -> dict[str, Any]:
        """Do what is not yet done, and give what `results.json` holds."""
        shipped = self._shipped() if self.tier.shipped else []
        rows = self._pca()
        for variant in self.variants:
            rows += self._variant(variant)
        results = {"meta": self._meta(), "rows": rows, "shipped": shipped}
        write_json(self.folder / "results.json", results)
        write_json(self.folder / "details.json", self._details())
        return results

    # -- the shared stream -----------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        say("loading the language model")
        return load_model("smollm2-135m")

    @cached_property
    def store(self) -> ActivationStore:
        return ActivationStore(self.model, load_text(), self.tier.hook, tokens=self.recipe.harvest, seed=self.seed)

    @cached_property
    def calibration(self) -> Tensor:
        return calibration_activations(self.model, self.tier.hook, self.store.norm_limit, self.tier.calibration)

    @cached_property
    def heldout(self) -> Heldout:
        # the shipped SAEs know the limit without waiting for the training text to be harvested
        limit = pretrained.manifest()["mask"]["norm_limit"] if self.tier.shipped else self.store.norm_limit
        text = load_text(split="heldout")
        sizes = {"tokens": self.tier.tokens_fvu, "ce_tokens": self.tier.tokens_ce}
        return Heldout(self.model, text, self.tier.hook, norm_limit=limit, **sizes)

    # -- steps, each kept in a file ----------------------------------------------------------------

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return self.read(path)

    def read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TutorialError(f"{path} is damaged ({error}): remove it, and run again to make it anew") from error

    def _shipped(self) -> list[dict[str, Any]]:
        """The SAEs that come with the project, on this machine: the first rows, before anything is trained."""

        def measure() -> list[dict[str, Any]]:
            saes = {variant: pretrained.load_pretrained(variant) for variant in pretrained.manifest()["saes"]}
            for variant, sae in saes.items():
                found = reconstruction(sae, self.heldout)
                l0 = float(found.l0_per_token.double().mean())
                say(f"shipped {variant}, cut {sae.cut}: L0 {l0:.1f}, FVU {found.fvu:.4f}")
            rows = []
            for variant, sae in saes.items():
                made = pretrained.manifest()["saes"][variant]
                result = evaluate(sae, self.model, self.heldout)
                rows += self._rows(sae, [result], made["train_seconds"], made["tokens_per_second"])
            return rows

        return self._once("shipped", measure)

    def _pca(self) -> list[dict[str, Any]]:
        def measure() -> list[dict[str, Any]]:
            start = time.perf_counter()
            pca = PCA(self.store.sample(min(50_000, len(self.store))), self.recipe.k)
            seconds = time.perf_counter() - start
            return self._rows(pca, [evaluate(pca, self.model, self.heldout)], seconds, None)

        return self._once("pca", measure)

    def _trained(self, variant: str) -> TrainResult:
        # vanilla has no use for a threshold, so it does not wait for the calibration text to be harvested
        data = self.calibration if variant == "batchtopk" else None
        settings = self.recipe.settings(variant)
        sae = VARIANTS[variant](self.store.d_in, self.recipe.d_sae, seed=self.seed, **settings)
        sae.to(self.model.cfg.device)
        return train(sae, self.store, self.recipe.config, out=self.folder / variant, calibration=data)

    def _variant(self, variant: str) -> list[dict[str, Any]]:
        def measure() -> list[dict[str, Any]]:
            sae, _, seconds, rate, _ = self._trained(variant)
            say(f"measuring {variant} on held-out text")
            results = [evaluate(sae, self.model, self.heldout, cut=cut) for cut in CUTS[variant]]
            return self._rows(sae, results, seconds, rate)

        return self._once(f"{variant}/eval", measure)

    def _rows(
        self, sae: SAE | PCA, results: list[EvalResult], seconds: float, rate: float | None
    ) -> list[dict[str, Any]]:
        rows = []
        for result in results:
            numbers = {name: value for name, value in result.numbers().items() if name in MEASURED}
            row = {"variant": sae.variant, "cut": result.cut} | numbers
            rows.append(row | {"train_seconds": seconds, "tokens_per_second": rate})
            name = f"{sae.variant}, cut {result.cut}"
            say(f"{name}: L0 {result.l0:.1f}, FVU {result.fvu:.4f}, CE +{result.ce_increase:.3f}")
        return rows

    def _meta(self) -> dict[str, Any]:
        def describe() -> dict[str, Any]:
            tier, recipe = self.tier, self.recipe
            return {
                "tier": self.name,
                "seed": self.seed,
                "model": "smollm2-135m",
                "model_note": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1) file",
                "dtype": self.store.card.dtype,
                "hook": tier.hook,
                "d_sae": recipe.d_sae,
                "k": recipe.k,
                "settings": {variant: recipe.settings(variant) for variant in CUTS},
                "tokens_seen": recipe.config.steps * recipe.config.batch_size,
                "tokens_distinct": len(self.store),
                "tokens_fvu": len(self.heldout.store),
                "tokens_ce": int(self.heldout.counted.sum()),
                "tokens_calibration": len(self.calibration),
                "dropped": self.store.dropped,
                "ce_clean": self.heldout.clean,
                "train": recipe.config.__dict__,
                "hardware": hardware(),
                "versions": versions("tutorial-sae", "torch", "transformer-lens", "transformers"),
            }

        return self._once("meta", describe)

    def _details(self) -> dict[str, Any]:
        """What the report shows beyond the table."""
        parts = {variant: self._once(f"{variant}/details", partial(self._detail, variant)) for variant in self.variants}
        names = ("l0_counts", "l0_by_kind", "histories")
        shown = {name: {variant: part[name] for variant, part in parts.items()} for name in names}
        return shown | {"latents": self._once("latents", self._latents)}

    @cached_property
    def kinds(self) -> list[str]:
        return [kind_of(self.heldout.store.piece(i)) for i in range(len(self.heldout.store))]

    def _detail(self, variant: str) -> dict[str, Any]:
        result = self._trained(variant)
        l0 = reconstruction(result.sae, self.heldout).l0_per_token
        members = {kind: torch.tensor([k == kind for k in self.kinds]) for kind in sorted(set(self.kinds))}
        return {
            "l0_counts": torch.bincount(l0).tolist(),
            "l0_by_kind": {kind: float(l0[mine].double().mean()) for kind, mine in members.items()},
            "histories": result.history,
        }

    def _latents(self) -> list[dict[str, Any]]:
        index = Latents(self._trained("batchtopk").sae, self.heldout.store)
        live = ((index.density >= 1 / 5000) & (index.density <= 1 / 50)).nonzero().squeeze(1)
        drawn = live[torch.randperm(len(live), generator=generator(self.seed, "examples"))[:EXAMPLE_LATENTS]]
        return [
            {"index": i, "density": float(index.density[i]), "examples": [e._asdict() for e in index.examples(i)]}
            for i in sorted(drawn.tolist())
        ]


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def compare(
    tier: str = "cpu", *, seed: int = 0, out: str | Path | None = None, every_variant: bool = False
) -> dict[str, Any]:
    """Run (or go on with) a comparison, print its table, write `results.json` and the report. Gives the results."""
    comparison = Comparison(tier, seed=seed, out=out, every_variant=every_variant)
    results = comparison.run()
    if results["shipped"]:
        print(f"\nThe SAEs that come with the project, trained for long:\n\n{results_table(results['shipped'])}")
        print("\nTrained here, in a short run:\n")
    print(results_table(results["rows"]))
    print(f"\nTrained with one cut, cut by another:\n\n{cross_table(results['rows'])}\n")
    report, shown = comparison.folder / "report.html", comparison.folder / "report.json"
    if not report.exists() or not shown.exists() or comparison.read(shown) != results:
        say("writing the report")
        write_report(comparison.folder)
        write_json(shown, results)
    if tier == "ci":
        print("This was the small run for checks: its numbers are not for quoting.")
    print(f"Results: {comparison.folder / 'results.json'}")
    print(f"Report:  {report}  (open it in a browser)")
    if Path("notebooks").is_dir():
        print("Course:  jupyter lab notebooks/")
    return results
