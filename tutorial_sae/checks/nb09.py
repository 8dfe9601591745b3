"""Checks of lesson 09: planning, resuming, many processes, handing on.

What a check says to a known slip stands in its docstring. Most slips are the right function with one setting changed,
and their names say which: `each_4` is what comes out of it with each=4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tutorial_sae.checks.core import Case, Failed, call, exercise, like, sentences, try_cases


def _try(check: Any, answer: Any, right: Any, cases: dict[str, tuple[Any, ...]]) -> str:
    named = {said: name.rsplit("_", 1) for name, said in sentences(check).items()}
    slips = {said: partial(right, **{setting: int(value)}) for said, (setting, value) in named.items()}
    return try_cases(answer, right, [Case(*case) for case in cases.items()], slips)


@exercise("9.1", "bytes by hand")
def bytes_by_hand(training_bytes: Any) -> str:
    """each_4: That is the SAE in a file. In training each number has a gradient and two moments of Adam with it.
    each_12: You count three numbers for each weight, and there are four: itself, its gradient, and two moments of Adam.
    each_8: You count two numbers for each weight, and there are four: itself, its gradient, and two moments of Adam.
    matrices_1: You count one matrix, and there are two: W_enc and W_dec.
    biases_0: The biases are missing: one number for each latent, and one for each dimension of x.
    z_16: No Adam goes with z: it is n * d_sae numbers of 4 bytes, and no parameter.
    z_2: In float32 each of the n * d_sae numbers of z takes 4 bytes.
    """

    def right(d: int, w: int, n: int, each: int = 16, matrices: int = 2, biases: int = 1, z: int = 4) -> Any:
        return each * (matrices * d * w + biases * (w + d)), z * n * w

    cases = {"a tiny SAE": (3, 5, 2), "GPT-2's": (768, 12_288, 4096), "Gemma 2's": (2304, 16_384, 4096)}
    return _try(bytes_by_hand, training_bytes, right, cases)


@exercise("9.2", "hours by hand")
def hours_by_hand(hours: Any) -> str:
    """lm_6: The language model does not learn: it runs forward only, 2 per weight and token.
    sae_4: The SAE learns: 2 per weight and token forward, and twice that for the gradients, so 6; of two matrices.
    sae_6: Either a matrix or the gradients are missing: 6 per weight and token, and 2 * d_in * width weights.
    apiece_1: You let the language model run once for each SAE. They share the harvest: once for all.
    percent_40: Only 0.4 * flops is reached: nobody gets all that the data sheet says. So the hours become more.
    percent_16: You multiply by 0.4. A rate stands below the line: divide by 0.4 * flops.
    percent_360000: That is seconds. 3600 of them are an hour.
    """

    def right(t: Any, low: Any, d: Any, ws: Any, flops: Any, lm: Any = 2, sae: Any = 12, apiece: Any = 0, percent=100):
        each = lm * low * (len(ws) if apiece else 1) + sae * d * sum(ws)
        return t * each / (0.4 * flops * 3600) * percent / 100

    cases = {"one SAE": (1e7, 900, 10, [40], 1e6), "four SAEs": (5e7, 3e3, 50, [20, 30, 40, 10], 2e7)}
    return _try(hours_by_hand, hours, right, cases)


def _parts(loop: Any) -> dict[str, torch.Tensor]:
    adam = [torch.as_tensor(v).flatten() for state in loop.adam.state.values() for v in state.values()]
    parts = {"weight": loop.weight.detach().clone(), "moments": torch.cat([*adam, torch.zeros(1)])}
    return parts | {"step": torch.tensor(loop.step), "order": loop.order.get_state()}


@exercise("9.3", "lose it, resume it", kind="break it")
def resume(loop: Any, save_state: Any, load_state: Any) -> str:
    """moving: What you saved went on training: it holds the tensors themselves, not copies of them (`copy.deepcopy`).
    weight: The weight is not the one that was saved.
    moments: Adam's memory is missing: its moments and the number of its steps, in `loop.adam.state_dict()`.
    step: The number of the step is missing: the learning rate starts its schedule again.
    order: The place in the data is missing: the state of `loop.order`, which draws the batches. They come once more.
    other: All the state is back, and still they part: does Adam step the tensor that the loop uses? Copy into
        `loop.weight` rather than putting another in its place.
    """
    whole, again = loop(1), loop(1)
    whole.run(3)
    before, state = _parts(whole), like(call(save_state, whole), {}, "the state")
    whole.run(5)
    call(load_state, again, state)
    after, got = _parts(whole), _parts(again)
    wrong = [name for name in got if not torch.equal(got[name], before[name])]
    again.run(5)
    if wrong or not torch.equal(again.weight, whole.weight):
        moved = any(torch.equal(got[name], after[name]) for name in wrong)
        why = sentences(resume)["moving" if moved else [*wrong, "other"][0]]
        two = "stopped after 3 of 8 steps, weight[0] ends at {:.5f}; never stopped, at {:.5f}"
        raise Failed(f"{why} ({two.format(*(part.weight[0].item() for part in (again, whole)))})")
    return "stopped after 3 of 8 steps: equal to the last bit"


@exercise("9.4", "one cut for all ranks")
def one_cut(to_send: Any, bar: Any) -> str:
    """zero_1: What is 0 is not kept: the smallest of the positive numbers is wanted.
    most_9900: A rank sends too much: more than the budget's largest can never be kept, whatever the others have.
    most_50: A rank sends its share of the budget only. Perhaps all that is large is here: send the budget's largest.
    end_50: You average the bars of the ranks. One cut through all that was sent is wanted.
    end_0: You take the smallest number that was sent. Of all of them together only the budget largest are kept.
    end_100: You take the highest of the ranks' bars. One cut through all that was sent is wanted.
    """

    def right(parts: Any, budget: int, most: int = 100, end: int = -1, zero: int = 0) -> Any:
        sent = [z.flatten().sort(descending=True).values[: budget * most // 100] for z in parts]
        kept = torch.cat(sent).sort(descending=True).values[:budget]
        bars = torch.stack([values[-1] for values in sent])
        return max(map(len, sent)), float(bars.quantile(end / 100) if end >= 0 else kept[(kept > 0) | bool(zero)].min())

    def learned(parts: Any, budget: int) -> Any:
        sent = [call(to_send, z, budget) for z in parts]
        return max(map(len, sent)), call(bar, sent, budget)

    torch.manual_seed(9)
    cases = {"two ranks": ([*torch.rand(2, 3, 4)], 4), "one has all": ([torch.rand(2, 5) + 9, torch.rand(2, 5)], 6)}
    cases |= {"four ranks": ([*torch.rand(4, 3, 4)], 8), "few positives": ([*torch.rand(2, 2, 5) * torch.eye(2, 5)], 6)}
    return _try(one_cut, learned, right, cases)


@exercise("9.5", "units folded away")
def folded_away(fold: Any) -> str:
    """swap_1: W_enc and W_dec go the wrong way. x comes in raw units: W_enc is divided by scale, W_dec multiplied.
    enc_0: W_enc is as it was: x comes in raw units now, larger by scale, and z must stay what it was.
    dec_0: W_dec is as it was: what it writes must come out in raw units, larger by scale.
    bias_0: b_dec is in normalised units: multiply it by scale before the mean is added.
    mean_0: The mean is missing: raw activations are not centred.
    twice_1: The mean is in raw units already: only b_dec is multiplied by scale.
    """

    def right(W: Any, b: Any, D: Any, c: Any, m: Any, s: Any, swap=0, enc=1, dec=1, bias=1, mean=1, twice=0) -> Any:
        return W / s ** (enc - 2 * swap), b, D * s ** (dec - 2 * swap), c * s**bias + mean * m * s**twice

    torch.manual_seed(9)
    sizes = [(3, 5), (5,), (5, 3), (3,), (3,)]
    cases = {f"scale {scale}": (*(torch.randn(size) for size in sizes), scale) for scale in (4.0, 0.25)}
    return _try(folded_away, fold, right, cases)
