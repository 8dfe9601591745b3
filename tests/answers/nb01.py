"""Answers to lesson 01."""

from __future__ import annotations

import torch
from einops import rearrange

from tests.answers import Answer
from tutorial_sae.checks import nb01 as check


def _hooked(pick, *, remove=True, grad=False, shift=0):
    """A hook that keeps `pick(inputs, output)` of block `layer + shift`."""

    def read(hf, tokens, layer):
        got = []
        place = hf.model.layers[layer + shift]
        handle = place.register_forward_hook(lambda module, inputs, output: got.append(pick(inputs, output)))
        with torch.set_grad_enabled(grad):
            hf(tokens)
        if remove:
            handle.remove()
        return got[0]

    return read


def _by_hidden_states(hf, tokens, layer, entry=1):
    with torch.no_grad():
        return hf(tokens, output_hidden_states=True).hidden_states[layer + entry]


def _by_next_input(hf, tokens, layer):
    """What enters the next block, or the final norm, is what leaves this one."""
    blocks, got = hf.model.layers, {}
    after = blocks[layer + 1] if layer + 1 < len(blocks) else hf.model.norm
    handle = after.register_forward_pre_hook(lambda module, inputs: got.update(x=inputs[0].detach().clone()))
    try:
        with torch.no_grad():
            hf(tokens)
    finally:
        handle.remove()
    return got["x"]


def _switches_gradients_off(hf, tokens, layer):
    torch.set_grad_enabled(False)
    return _hooked(lambda i, o: o)(hf, tokens, layer)


def _edits(hf, tokens, layer):
    """The hook gives something back, and so replaces what the block says; the values read are right all the same."""
    got = []
    handle = hf.model.layers[layer].register_forward_hook(lambda m, i, o: got.append(o) or 0 * o)
    with torch.no_grad():
        hf(tokens)
    handle.remove()
    return got[0]


HOOK = [
    ("a hook, its output", _hooked(lambda i, o: o), None),
    ("detach instead of no_grad", _hooked(lambda i, o: o.detach().clone(), grad=True), None),
    ("a pre-hook of what comes next", _by_next_input, None),
    ("the input of the block", _hooked(lambda i, o: i[0]), "You read what enters the block"),
    ("the block before", _hooked(lambda i, o: o, shift=-1), "You read"),
    ("hidden_states[layer]", lambda hf, t, n: _by_hidden_states(hf, t, n, 0), "You read what enters the block"),
    ("hidden_states[layer + 1]", _by_hidden_states, "been through the final norm"),
    ("output[0]", _hooked(lambda i, o: o[0]), "has shape (5, 8), and (2, 5, 8) was wanted"),
    ("the hook stays", _hooked(lambda i, o: o, remove=False), "still on the model"),
    ("with gradients", _hooked(lambda i, o: o, grad=True), "run under `torch.no_grad()`"),
    ("gradients off for good", _switches_gradients_off, "switches gradients off"),
    ("nothing given back", lambda hf, t, n: None, "is a `return` missing?"),
    ("list of activations", lambda hf, t, n: [_hooked(lambda i, o: o)(hf, t, n)], "must be a tensor"),
    ("a hook that edits too, values read right", _edits, None),
]


def _svd(x, n):
    s = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).S
    return s[:n].square().sum() / s.square().sum()


def _residual(x, n):
    """One minus what a projection leaves over."""
    c = (x - x.mean(dim=0)).double()
    v = torch.linalg.svd(c, full_matrices=False).Vh[:n]
    return 1 - float((c - c @ v.T @ v).square().sum() / c.square().sum())


def _ratio(values, n):
    return float(values[:n].sum() / values.sum())


DIRECTIONS = [
    ("svd, a tensor", _svd, None),
    ("by projection", _residual, None),
    ("eigenvalues of the covariance", lambda x, n: _ratio(torch.linalg.eigvalsh(x.T.cov()).flip(0), n), None),
    ("mean not subtracted", lambda x, n: _ratio(torch.linalg.svdvals(x) ** 2, n), "did not subtract the mean"),
    ("not squared", lambda x, n: _ratio(torch.linalg.svdvals(x - x.mean(0)), n), "*squares* of the singular"),
    ("the n-th alone", lambda x, n: float(_svd(x, n) - _svd(x, n - 1)), "the first n together"),
    ("coordinates", lambda x, n: _ratio(x.var(0).sort(descending=True).values, n), "the n best coordinates"),
    ("percent", lambda x, n: 100 * float(_svd(x, n)), "not in percent"),
    ("what is left", lambda x, n: 1 - float(_svd(x, n)), "the share left over"),
    ("smallest first", lambda x, n: _ratio(torch.linalg.eigvalsh(x.T.cov()), n), "the n smallest"),
    ("mean of each row", lambda x, n: _ratio(torch.linalg.svdvals(x - x.mean(1, keepdim=True)) ** 2, n), "is right"),
    ("all shares", lambda x, n: torch.linalg.svdvals(x - x.mean(0)) ** 2, "must be one number"),
]


def _loop_sinks(norms, factor=10.0):
    middle = sorted(norms.flatten().tolist())[norms.numel() // 2]
    return torch.tensor([[bool(v > factor * middle) for v in row] for row in norms])


SINKS = [
    ("median", lambda norms, factor=10.0: norms > factor * norms.median(), None),
    ("quantile", lambda norms, factor=10.0: norms / norms.quantile(0.5) > factor, None),
    ("loops", _loop_sinks, None),
    ("mean", lambda norms, factor: norms > factor * norms.mean(), "which the sinks themselves pull up"),
    ("median of each row", lambda n, f: n > f * n.median(-1, keepdim=True).values, "one median over all tokens"),
    ("upside down", lambda n, f: n <= f * n.median(), "upside down"),
    (
        "first position only",
        lambda n, f: (n > f * n.median()) & (torch.arange(n.shape[1]) == 0),
        "sinks stand elsewhere",
    ),
    ("factor ignored", lambda n, f: n > 10 * n.median(), "Use the factor that is given"),
    ("numbers for truth values", lambda n, f: (n > f * n.median()).float(), "torch.bool was wanted"),
    ("the norms that are left", lambda n, f: n[n > f * n.median()], "was wanted"),
]


def _clumping(batches):
    x = torch.cat(batches)
    means = torch.stack([b.mean(dim=0) for b in batches])
    n = len(batches[0])
    return n * (means - x.mean(dim=0)).square().sum(dim=1).mean() / (x - x.mean(dim=0)).square().sum(dim=1).mean()


def _by_var(batches):
    x, means = torch.cat(batches).double(), torch.stack([b.double().mean(0) for b in batches])
    return float(len(batches[0]) * means.var(0, correction=0).sum() / x.var(0, correction=0).sum())


def _within(batches):
    means = torch.stack([b.mean(0) for b in batches])
    inside = torch.stack([b.var(0, correction=0).sum() for b in batches]).mean()
    return float(len(batches[0]) * means.var(0, correction=0).sum() / inside)


def _from_origin(batches):
    x, means = torch.cat(batches), torch.stack([b.mean(0) for b in batches])
    return float(len(batches[0]) * means.square().sum(1).mean() / x.square().sum(1).mean())


def _by_default_var(batches):
    means = torch.stack([b.mean(0) for b in batches])
    return float(len(batches[0]) * means.var(0).sum() / torch.cat(batches).var(0).sum())


MIXED = [
    ("as defined", _clumping, None),
    ("by var", _by_var, None),
    ("n forgotten", lambda b: float(_clumping(b)) / len(b[0]), "Multiply by n"),
    ("lengths", lambda b: float(_clumping(b)) ** 0.5, "a ratio of lengths"),
    ("spread inside the batches", _within, "the spread inside the batches"),
    ("from the origin", _from_origin, "You measure from 0"),
    ("var as it comes", _by_default_var, "one less than the count"),
    ("number of batches for n", lambda b: float(_clumping(b)) / len(b[0]) * len(b), "is right"),
    ("a number for each coordinate", lambda b: torch.stack([m.mean(0) for m in b]).var(0), "must be one number"),
]


def _about(x, centre):
    return float((x - centre).square().sum(dim=1).mean())


def _by_normalized(x):
    centred = x - x.mean(dim=0)
    return [x.mean(dim=0), torch.linalg.norm(centred) / centred.numel() ** 0.5]


NORMALISATION = [
    ("as defined", lambda x: (x.mean(0), (_about(x, x.mean(0)) / x.shape[1]) ** 0.5), None),
    ("from one norm, a list", _by_normalized, None),
    ("with n - 1", lambda x: (x.mean(dim=0), x.var(dim=0).mean().sqrt()), None),
    ("length before the mean is off", lambda x: (x.mean(0), (_about(x, 0) / 8) ** 0.5), "before the mean is taken"),
    ("E|x|² = 1", lambda x: (x.mean(0), _about(x, x.mean(0)) ** 0.5), "this is the scale trap"),
    ("no root", lambda x: (x.mean(0), _about(x, x.mean(0)) / 8), "Take the root"),
    ("to multiply by", lambda x: (x.mean(0), (_about(x, x.mean(0)) / 8) ** -0.5), "The number to divide by"),
    ("mean norm", lambda x: (x.mean(0), float((x - x.mean(0)).norm(dim=1).mean()) / 8**0.5), "mean *squared* norm"),
    ("mean of the deviations", lambda x: (x.mean(0), x.std(0).mean()), "averaged the standard deviations"),
    ("a scale for each coordinate", lambda x: (x.mean(0), x.std(0)), "must be one number"),
    ("one mean for all", lambda x: (x.mean(), x.std()), "has shape ()"),
    ("the scale alone", lambda x: x.std(), "must be 2 things"),
]


def _units(e=1, d=1, t=1, penalty=1):
    return lambda b_enc, b_dec, theta, l1, c: (b_enc / c**e, b_dec / c**d, theta / c**t, l1 / c**penalty)


def _units_by_factor(b_enc, b_dec, theta, l1, c):
    return [value * (1 / c) for value in (b_enc, b_dec, torch.tensor(theta), l1)]


def _units_in_place(b_enc, b_dec, theta, l1, c):
    b_enc /= c
    b_dec /= c
    return b_enc, b_dec, theta / c, l1 / c


UNITS = [
    ("as meant", _units(), None),
    ("by a factor, a list", _units_by_factor, None),
    ("θ forgotten", _units(t=0), "The threshold θ is compared"),
    ("b_dec forgotten", _units(d=0), "The bias b_dec is subtracted"),
    ("b_enc forgotten", _units(e=0), "The bias b_enc is added"),
    ("l1 forgotten", _units(penalty=0), "For the same balance l1 falls with c"),
    ("l1 twice", _units(penalty=2), "divide l1 by c once"),
    ("multiplied", _units(-1, -1, -1, -1), "The wrong way round"),
    ("in place", _units_in_place, "changes the tensor that it is given"),
]


def _by_einops(f, x):
    return rearrange(f(rearrange(x, "batch pos d -> (batch pos) d")), "(batch pos) e -> batch pos e", pos=x.shape[1])


def _transposed_back(f, x):
    return f(x.flatten(0, 1)).unflatten(0, (x.shape[1], len(x))).transpose(0, 1)


ROWS = [
    ("einops", _by_einops, None),
    ("flatten and unflatten", lambda f, x: f(x.flatten(0, 1)).unflatten(0, x.shape[:2]), None),
    ("view", lambda f, x: f(x.view(-1, x.shape[-1])).view(*x.shape[:2], -1), None),
    ("f on three dimensions", lambda f, x: f(x), "The function f takes"),
    ("each text by itself", lambda f, x: torch.stack([f(text) for text in x]), "a batch cut must see all tokens"),
    ("(pos batch)", lambda f, x: _by_einops(f, x.transpose(0, 1)).transpose(0, 1), "reading order is (batch pos)"),
    ("reshape to (d, -1)", lambda f, x: f(x.reshape(6, -1).T).reshape(3, 5, -1), "pieces of several tokens"),
    ("d to the front", lambda f, x: f(x.permute(2, 0, 1).reshape(-1, 6)).reshape(3, 5, -1), "moved d to the front"),
    ("wrong way back", _transposed_back, "On the way back batch and pos change places"),
    ("not back", lambda f, x: f(x.flatten(0, 1)), "was wanted"),
    ("same width supposed", lambda f, x: f(x.flatten(0, 1)).reshape(x.shape), "raised RuntimeError"),
]

LETTERS = {
    check.too_few: ("c", {"a": "Block 15 is never run", "b": "looked into the cache", "d": "That would be kinder"}),
    check.one_direction: ("c", {"a": "near one line", "b": "Less.", "d": "576 directions"}),
    check.crowd: ("c", {"a": "worth its price", "b": "The other way round", "d": "a mixture of the five"}),
    check.which_store: ("b", {"a": "a short buffer", "c": "from all tokens"}),
}

ANSWERS = [
    Answer(which, label, (f,), says)
    for which, answers in (
        (check.hook, HOOK),
        (check.directions, DIRECTIONS),
        (check.find_sinks, SINKS),
        (check.mixed, MIXED),
        (check.normalisation, NORMALISATION),
        (check.units, UNITS),
        (check.three_to_two, ROWS),
    )
    for label, f, says in answers
]
for question, (right, wrong) in LETTERS.items():
    ANSWERS += [Answer(question, f"letter {right}", (right,), None)]
    ANSWERS += [Answer(question, "in brackets, a capital", (f"({right.upper()})",), None)]
    ANSWERS += [Answer(question, f"letter {letter}", (letter,), says) for letter, says in wrong.items()]
    ANSWERS += [Answer(question, "no letter", ("maybe",), "none of the letters")]
