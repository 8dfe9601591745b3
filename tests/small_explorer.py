"""Something to explore without a language model: made-up matrices, and a model of bytes that takes any sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from small_models import ToyModel

from tutorial_sae import BatchTopKSAE
from tutorial_sae.widgets.explorer import ExplorerData

WORDS = [
    "The",
    "ferry",
    "leaves",
    "the",
    "harbour",
    "at",
    "seven",
    "and",
    "is",
    "back",
    "before",
    "lamps",
    "are",
    "lit",
]


def made_up(
    tokens: int = 14, latents: int = 96, seed: int = 0, beside: Sequence[int] = (), step: float = 0.0, k: int = 8
) -> ExplorerData:
    """A random matrix, half of it 0, and neighbours of `beside` tokens; `step` rounds values, so that some are tied."""
    chance = torch.Generator().manual_seed(seed)

    def matrix(n: int, scale: float = 1.0) -> torch.Tensor:
        z = (scale * (torch.randn(n, latents, generator=chance) + torch.randn(n, 1, generator=chance))).relu()
        return (z / step).round() * step if step else z

    z, decoder = matrix(tokens), torch.randn(latents, 12, generator=chance)
    decoder /= decoder.norm(dim=1, keepdim=True)
    x = z @ decoder + torch.randn(tokens, 12, generator=chance)
    errors = []
    for row, x_row in zip(z, x, strict=True):
        order = [i for _, i in sorted((-value, i) for i, value in enumerate(row.tolist()))]
        x_hat = torch.cat([torch.zeros(1, 12), (row[order, None] * decoder[order]).cumsum(dim=0)])
        errors.append((x_row - x_hat).square().sum(dim=1))
    neighbours = {f"text {i}": matrix(n, 1 + i) for i, n in enumerate(beside)}
    pieces = [" " + WORDS[t % len(WORDS)] for t in range(tokens)]
    return ExplorerData(
        "".join(pieces).strip(),
        pieces,
        z,
        torch.stack(errors),
        x.square().sum(dim=1),
        neighbours,
        k,
        1.0 if step else 0.8123,
    )


class ByteTokenizer:
    """Each byte of a text is a token; 0 and 1 are special."""

    bos_token_id, eos_token_id = 1, 0
    all_special_ids = (0, 1)

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2 + byte for byte in text.encode()] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": 0}

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 2 for i in ids).decode(errors="replace")


class ByteModel(ToyModel):
    """Its activations are random directions, one for each byte, turned a little by what came before."""

    D_IN = 16

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: Any = ByteTokenizer()
        self.table = torch.randn(258, self.D_IN, generator=torch.Generator().manual_seed(0))

    def run_with_cache(self, tokens: torch.Tensor, names_filter: str, stop_at_layer: int) -> tuple[None, dict]:
        own = self.table[tokens]
        return None, {names_filter: own + own.cumsum(dim=1).roll(1, 1) / 8}


def byte_sae(latents: int = 64, k: int = 6) -> BatchTopKSAE:
    sae = BatchTopKSAE(ByteModel.D_IN, latents, k=k).eval()
    sae.fit_normalization(ByteModel().table)
    sae.threshold.fill_(0.9)
    return sae
