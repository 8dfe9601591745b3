"""Answers to the warm-up of notebook 00."""

from tests.answers import Answer
from tutorial_sae.checks import nb00

ANSWERS = [
    Answer(nb00.l0, "sum, then mean", (lambda f: (f != 0).sum(dim=-1).float().mean(),), None),
    Answer(nb00.l0, "a Python loop", (lambda f: sum(int((row > 0).sum()) for row in f) / len(f),), None),
    Answer(nb00.l0, "count over the number of tokens", (lambda f: f.count_nonzero().item() / f.shape[0],), None),
    Answer(nb00.l0, "the stub: share of entries", (lambda f: (f > 0).float().mean(),), "share of all entries"),
    Answer(nb00.l0, "all tokens together", (lambda f: (f > 0).sum(),), "divide by the number of tokens"),
    Answer(nb00.l0, "sum of values", (lambda f: f.sum(dim=-1).mean(),), "adds up the values"),
    Answer(nb00.l0, "tokens per latent", (lambda f: (f > 0).float().sum(dim=0).mean(),), "for each token, the latents"),
    Answer(nb00.l0, "one count per token", (lambda f: (f > 0).sum(dim=-1),), "must be one number"),
    Answer(nb00.l0, "first token only", (lambda f: (f[0] > 0).sum(),), "one token only"),
    Answer(nb00.l0, "the largest count", (lambda f: (f > 0).sum(dim=-1).max(),), "largest count"),
    Answer(nb00.l0, "nothing returned", (lambda f: None,), "is a `return` missing?"),
    Answer(nb00.l0, "a number instead of a function", (3.0,), "A function was wanted"),
]
