"""Checks of lesson 01: activations.

What a check says to a known slip, or to a wrong letter, stands in its docstring, under the name by which `_said` finds
the function that makes the slip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_sae.checks.core import Case, Failed, call, choose, exercise, sentences, try_cases
from tutorial_sae.runtime import generator
from tutorial_sae.saes.base import keep_batch


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "nb01"))


@torch.no_grad()
def _stream(hf: Any, tokens: Tensor, layer: int) -> Tensor:
    """The stream after block `layer`, from a copy of the model that has no block above it and no final norm."""
    short = copy.deepcopy(hf)
    short.model.layers, short.model.norm = short.model.layers[: layer + 1], nn.Identity()
    return short.model(tokens).last_hidden_state


@exercise("1.1", "a hook of your own", seconds=60)  # the first import of transformers is slow
def hook(read_by_hand: Any) -> str:
    """before: You read what enters the block, and what it gives back is wanted. (In `hidden_states` of Hugging Face
        entry 0 is the embedding, so that block 0 ends at entry 1.)
    after: You read one block too far.
    normed: The last of `hidden_states` has been through the final norm: it is not the residual stream any more.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def hooks(hf: Any) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())

    def careful(hf: Any, tokens: Tensor, layer: int) -> Any:
        got = call(read_by_hand, hf, tokens, layer)
        if hooks(hf) > before:
            raise Failed("Your hook is still on the model, and will run in every later pass: call `handle.remove()`.")
        if isinstance(got, Tensor) and got.requires_grad:
            raise Failed("Your result keeps the whole pass in memory for gradients: run under `torch.no_grad()`.")
        return got

    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    hf = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()  # type: ignore[arg-type]
    tokens = torch.tensor([[1, 7, 4, 9, 2], [3, 3, 8, 0, 6]])
    hf(tokens, output_hidden_states=True)  # for which transformers leaves hooks of its own
    before = hooks(hf)
    slips = sentences(
        hook,
        before=lambda hf, t, layer: _stream(hf, t, layer - 1),
        after=lambda hf, t, layer: _stream(hf, t, layer + 1),
        normed=lambda hf, t, layer: hf.model.norm(_stream(hf, t, layer)),
    )
    return try_cases(careful, _stream, [Case(f"block {i}", (hf, tokens, i)) for i in (1, 0, 2)], slips)


@exercise("1.2", "one layer too few", kind="predict")
def too_few(answer: Any) -> str:
    """a: Block 15 is never run: stop_at_layer=15 runs blocks 0 to 14, as a slice [:15] would.
    b: What *comes out* of the call is indeed the stream after block 14, but you looked into the cache, at block 15.
    d: That would be kinder. The call itself says nothing; the KeyError comes when you look into the cache.
    """
    return choose(answer, "c", sentences(too_few), "the hook lies in block 15, which is never run, and nothing says so")


def share_explained(x: Tensor, n: int) -> float:
    """The slow and sure way: eigenvalues of the covariance, in float64."""
    values = torch.linalg.eigvalsh((x - x.mean(dim=0)).double().T.cov()).flip(0)
    return float(values[:n].sum() / values.sum())


@exercise("1.3", "the best n directions")
def directions(explained: Any) -> str:
    """mean: You did not subtract the mean. Variance is about the mean; a long mean looks like one great direction.
    squares: Variance goes with the *squares* of the singular values.
    alone: That is the n-th direction alone: the first n together are wanted.
    axes: You took the n best coordinates. A direction may point anywhere: singular vectors are meant.
    percent: Give the share as a fraction between 0 and 1, not in percent.
    left: That is the share left over: the share explained is wanted.
    smallest: You took the n smallest: `eigh` and `eigvalsh` give the eigenvalues in ascending order.
    """

    def ratio(values: Tensor, n: int) -> float:
        return float(values[:n].sum() / values.sum())

    slips = sentences(
        directions,
        mean=lambda x, n: ratio(torch.linalg.svdvals(x).square(), n),
        squares=lambda x, n: ratio(torch.linalg.svdvals(x - x.mean(0)), n),
        alone=lambda x, n: share_explained(x, n) - share_explained(x, n - 1),
        axes=lambda x, n: ratio(x.var(0).sort(descending=True).values, n),
        percent=lambda x, n: 100 * share_explained(x, n),
        left=lambda x, n: 1 - share_explained(x, n),
        smallest=lambda x, n: 1 - share_explained(x, x.shape[1] - n),
    )
    x = _draw(60, 6) * torch.tensor([3.0, 0.5, 2.0, 1.0, 0.8, 0.3]) @ torch.linalg.qr(_draw(6, 6, seed=1)).Q
    tries = {"one direction": (x, 1), "three": (x, 3), "a long mean": (x + 9, 2), "all": (x, 6)}
    return try_cases(explained, share_explained, [Case(*each) for each in tries.items()], slips)


@exercise("1.4", "find the sinks")
def find_sinks(sinks: Any) -> str:
    """mean: You compare with the mean, which the sinks themselves pull up. The median hardly moves.
    row: You take a median for each row, and a row may be mostly sinks: one median over all tokens is meant.
    other: Your mask is upside down: True is for sinks.
    first: You mark the first position only, and sinks stand elsewhere too.
    factor: Use the factor that is given: 10 is only its usual value.
    """
    slips = sentences(
        find_sinks,
        mean=lambda norms, factor: norms > factor * norms.mean(),
        row=lambda norms, factor: norms > factor * norms.median(dim=-1, keepdim=True).values,
        other=lambda norms, factor: norms <= factor * norms.median(),
        first=lambda norms, factor: (norms > factor * norms.median()) & (torch.arange(norms.shape[1]) == 0),
        factor=lambda norms, factor: norms > 10 * norms.median(),
    )
    large = 170 + 20 * _draw(5, 21)
    large[:, 0], large[2, 1], large[3, 1:15] = 25_000, 25_000, 2_500
    tries = {"sinks in many places": (large, 10.0), "none": (170 + 20 * _draw(5, 21), 10.0), "factor 16": (large, 16.0)}
    return try_cases(sinks, lambda v, f: v > f * v.flatten().sort().values[52], map(Case._make, tries.items()), slips)


@exercise("1.5", "what one direction explains now", kind="predict")
def one_direction(answer: Any) -> str:
    """a: All tokens would have to lie near one line. The sinks did; do ordinary tokens?
    b: Less. No single thing that a token can be about makes half of all the difference between tokens.
    d: There are 576 directions, so the average one explains 0.17 %, and the best cannot explain less than that.
    """
    return choose(answer, "c", sentences(one_direction), "nearly all of the one great direction was the sinks")


@exercise("1.6", "five features, two dimensions", kind="predict", core=False)
def crowd(answer: Any) -> str:
    """a: Two dimensions hold two features without interference, but some interference can be worth its price.
    b: The other way round: features that are seldom on seldom meet, so they can share.
    d: When all are on at once, each reading is a mixture of the five: keeping all would cost too much.
    """
    return choose(answer, "c", sentences(crowd), "the rarer the features, the more of them share the space")


def clumping_of(batches: Sequence[Tensor]) -> float:
    """n times the mean squared distance of batch means from the overall mean, over that of single tokens."""
    mean = torch.cat(list(batches)).mean(dim=0)
    between = [float((batch.mean(dim=0) - mean).square().sum()) for batch in batches]
    each = [float((row - mean).square().sum()) for batch in batches for row in batch]
    return len(batches[0]) * (sum(between) / len(between)) / (sum(each) / len(each))


@exercise("1.7", "how mixed is a batch?", kind="measure")
def mixed(clumping: Any) -> str:
    """size: Multiply by n, the size of a batch: a mean of n vectors varies n times less than they do.
    root: You give a ratio of lengths, and squared lengths are meant.
    inside: You compare with the spread inside the batches. The spread of all tokens about the overall mean is meant.
    origin: You measure from 0, and the overall mean is meant.
    bessel: You divide by one less than the count, as `torch.var` does by default: give it `correction=0`.
    """
    slips = sentences(
        mixed,
        size=lambda batches: clumping_of(batches) / len(batches[0]),
        root=lambda batches: clumping_of(batches) ** 0.5,
        inside=lambda b: 1 / (1 / clumping_of(b) - 1 / len(b[0])),
        origin=lambda b: clumping_of([*b, *(-batch for batch in b)]),
        bessel=lambda b: clumping_of(b) * (1 - 1 / len(torch.cat(list(b)))) / (1 - 1 / len(b)),
    )
    x = _draw(60, 4) + 3 * _draw(1, 4, seed=1)
    clumps = x + 2 * _draw(6, 4, seed=2).repeat_interleave(10, dim=0)
    cases = [Case("clumps", (list(clumps.split(10)),)), Case("mixed", (list(x.split(10)),)), Case("one batch", ([x],))]
    return try_cases(clumping, clumping_of, cases, slips)


@exercise("1.8", "which store does not shuffle?", kind="diagnose")
def which_store(answer: Any) -> str:
    """a: Store a has a short buffer, but inside it tokens do change places.
    c: Store c draws every batch from all tokens: that is what a shuffle is.
    """
    return choose(answer, "b", sentences(which_store), "it shuffles batches, and each batch stays one stretch of text")


@exercise("1.9", "one mean, one scale")
def normalisation(fit: Any) -> str:
    """early: You measure the length before the mean is taken off.
    unit: That makes E|x|² = 1, and it is to be d_in. Off by √d_in: this is the scale trap.
    root: Take the root: E|x|² goes with the square of the scale.
    inverse: That is the factor to multiply by. The number to divide by is wanted.
    length: You took the mean norm. The mean *squared* norm is meant.
    deviations: You averaged the standard deviations of the coordinates: average their squares, then take the root.
    """

    def slip(about: int, power: float, count: int) -> Callable[[Tensor], Any]:
        return lambda x: (x.mean(0), float((x - about * x.mean(0)).square().sum(1).mean() / count) ** power)

    names = {"early": (0, 0.5, 8), "unit": (1, 0.5, 1), "root": (1, 1, 8), "inverse": (1, -0.5, 8)}
    wrong = {name: slip(*how) for name, how in names.items()}
    wrong["length"] = lambda x: (x.mean(0), float((x - x.mean(0)).norm(dim=1).mean()) / 8**0.5)
    wrong["deviations"] = lambda x: (x.mean(0), float(x.std(0).mean()))
    x = _draw(2000, 8) * torch.tensor([5.0, 1, 1, 2, 0.5, 1, 1, 3]) + torch.arange(8.0)
    return try_cases(fit, slip(1, 0.5, 8), [Case("values", (x,))], sentences(normalisation, **wrong), tol=2e-3)


@exercise("1.10", "the same SAE in other units")
def units(in_other_units: Any) -> str:
    """theta: The threshold θ is compared with z, and z has just been divided by c: so must θ.
    b_dec: The bias b_dec is subtracted from x, so it has the units of x.
    b_enc: The bias b_enc is added to (x - b_dec) @ W_enc, which has the units of x: divide it too.
    free: The squared error falls with c², the penalty l1 * |z| only with c. For the same balance l1 falls with c.
    twice: The penalty is l1 * |z|, and |z| brings one of the two c already: divide l1 by c once.
    up: The wrong way round: x became smaller by c, and so does all that is compared with it.
    """

    def moved(*powers: int) -> Callable[..., Any]:
        return lambda *values: tuple(v / values[-1] ** p for v, p in zip(values, powers, strict=False))

    powers = {"theta": (1, 1, 0, 1), "b_dec": (1, 0, 1, 1), "b_enc": (0, 1, 1, 1), "free": (1, 1, 1, 0)}
    powers |= {"twice": (1, 1, 1, 2), "up": (-1, -1, -1, -1)}
    slips = sentences(units, **{name: moved(*p) for name, p in powers.items()})
    cases = [Case(f"c = {c:g}", (_draw(7), _draw(5, seed=1), 0.87, 2.0, c)) for c in (2.0, 0.5, 24.0)]
    return try_cases(in_other_units, moved(1, 1, 1, 1), cases, slips)


@exercise("1.11", "three dimensions to two, and back")
def three_to_two(on_rows: Any) -> str:
    """three: The function f takes (batch * pos, d), and you gave it three dimensions: it took `batch` for tokens.
    text: You call f on each row of text by itself: a batch cut must see all tokens at once.
    order: Your rows come in the order (pos batch), and reading order is (batch pos).
    pieces: The right shape with the wrong numbers in it: a row of yours holds pieces of several tokens.
    front: You moved d to the front and then reshaped: a row of yours holds one coordinate of many tokens.
    back: Your rows are right on the way in. On the way back batch and pos change places.
    """

    def oracle(f: Any, x: Tensor) -> Tensor:
        return f(torch.cat(list(x))).reshape(len(x), x.shape[1], -1)

    slips = sentences(
        three_to_two,
        three=lambda f, x: f(x),
        text=lambda f, x: torch.stack([f(text) for text in x]),
        order=lambda f, x: oracle(f, x.transpose(0, 1)).transpose(0, 1),
        pieces=lambda f, x: f(x.reshape(6, -1).T).reshape(3, 5, -1),
        front=lambda f, x: f(x.permute(2, 0, 1).reshape(-1, 6)).reshape(3, 5, -1),
        back=lambda f, x: oracle(f, x).reshape(5, 3, -1).transpose(0, 1),
    )
    tries = {"batch cut": lambda r: keep_batch(r.relu(), 1), "another width": lambda r: r[:, :4].cumsum(0)}
    return try_cases(on_rows, oracle, [Case(n, (f, _draw(3, 5, 6))) for n, f in tries.items()], slips)
