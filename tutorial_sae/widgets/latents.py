"""A page of all latents of an SAE: contexts, company and logits of each, a search, and an address for each
(`#latent=421`).

    latents_html(latents_data(model, sae, store))      in a notebook, or .save("page.html")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutorial_sae.activations import ActivationStore
from tutorial_sae.latents import Example, Latents, logit_effects
from tutorial_sae.plots import NAMES
from tutorial_sae.saes import SAE
from tutorial_sae.widgets.page import Page

SCRIPT = Path(__file__).with_suffix(".js")
MOST, EACH = 12_000_000, 350  # bytes of a page, and of an example in it: wide SAEs show fewer of them
LOGITS, COMPANY = 8, 4


def latents_data(model: Any, sae: SAE, store: ActivationStore) -> dict[str, Any]:
    """What the page shows, as plain lists; of the examples of one latent two thirds are its strongest."""
    index, tokenizer = Latents(sae, store), model.tokenizer
    total = min(12, max(1, MOST // (EACH * sae.d_sae)))
    latents = []
    for start in range(0, sae.d_sae, 256):  # the logits of all latents at once would be large
        numbers = range(start, min(sae.d_sae, start + 256))
        effects = logit_effects(model, sae, numbers)
        up, down = (side.topk(LOGITS).indices.tolist() for side in (effects, -effects))
        for i, latent in enumerate(numbers):
            strongest = index.examples(latent, max(1, total - total // 3))
            middle = index.examples(latent, total // 3, at=0.5)
            latents.append(
                {
                    "density": float(index.density[latent]),
                    "count": len(index.fired(latent)[0]),
                    "peak": round(float(index.peak[latent]), 2),
                    "top": [_listed(example) for example in strongest],
                    "middle": [_listed(example) for example in middle if example not in strongest],
                    "near": [(one.latent, round(one.share, 3)) for one in index.together(latent, COMPANY)],
                    "up": [tokenizer.decode([token]) for token in up[i]],
                    "down": [tokenizer.decode([token]) for token in down[i]],
                }
            )
    about = [
        f"{sae.d_sae} latents of a {NAMES[sae.variant]} SAE, {store.hook} of {store.card.name}; values on "
        f"{len(store):,} activations of held-out text ({store.text.source}). The darker a token's ground, the larger "
        "the value; what a latent fires on is not yet what it does.",
        "Text of the embedded corpus: Wikipedia (CC BY-SA 4.0), code and documentation; see NOTICE.",
    ]
    head = {"title": "Latents", "about": about, "tokens": len(store), "first": int(index.density.argmax())}
    return head | {"latents": latents}


def _listed(example: Example) -> list[Any]:
    return [example.pieces, [round(value, 2) for value in example.values], example.peak, example.source]


def latents_html(data: dict[str, Any], latent: int | None = None, height: int = 760) -> Page:
    """The page, open at a latent (default: the densest)."""
    if latent is not None and not 0 <= latent < len(data["latents"]):
        raise IndexError(f"latent {latent} of {len(data['latents'])}: choose 0 to {len(data['latents']) - 1}")
    return Page("Latents", SCRIPT, data if latent is None else data | {"first": latent}, height)
