"""Answers to lesson 09."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb09 as check


def stub(*_: Any) -> Any:
    raise NotImplementedError


# -- 9.1 -------------------------------------------------------------------------------------------------


def count(d_in: int, d_sae: int, n: int) -> tuple[int, int]:
    return 16 * (2 * d_in * d_sae + d_sae + d_in), 4 * n * d_sae


def count_tensors(d_in: int, d_sae: int, n: int) -> list[Tensor]:
    """By making them, without memory."""
    shapes = [(d_in, d_sae), (d_sae, d_in), (d_sae,), (d_in,)]
    weights = [torch.empty(shape, device="meta") for shape in shapes]
    z = torch.empty(n, d_sae, device="meta")
    return [torch.tensor(4.0 * sum(w.nbytes for w in weights)), torch.tensor(float(z.nbytes))]


def numbers(each: int, matrices: int = 2, biases: int = 1, z: Any = 4) -> Any:
    return lambda d, w, n: (each * (matrices * d * w + biases * (d + w)), z * n * w)


BYTES = [
    Answer(check.bytes_by_hand, "stub", (stub,), "not attempted"),
    Answer(check.bytes_by_hand, "arithmetic", (count,), None),
    Answer(check.bytes_by_hand, "tensors, a list", (count_tensors,), None),
    Answer(check.bytes_by_hand, "the file", (numbers(4),), "the SAE in a file"),
    Answer(check.bytes_by_hand, "one moment", (numbers(12),), "three numbers for each weight"),
    Answer(check.bytes_by_hand, "no Adam", (numbers(8),), "two numbers for each weight"),
    Answer(check.bytes_by_hand, "tied", (numbers(16, matrices=1),), "one matrix"),
    Answer(check.bytes_by_hand, "no biases", (numbers(16, biases=0),), "biases are missing"),
    Answer(check.bytes_by_hand, "Adam for z", (numbers(16, z=16),), "No Adam goes with z"),
    Answer(check.bytes_by_hand, "z in bfloat16", (numbers(16, z=2),), "In float32"),
    Answer(check.bytes_by_hand, "gigabytes", (lambda *a: tuple(v / 1e9 for v in count(*a)),), "is right"),
    Answer(check.bytes_by_hand, "k entries of z", (lambda d, w, n: (count(d, w, n)[0], 4 * n * 32),), "is right"),
    Answer(check.bytes_by_hand, "only the first", (lambda d, w, n: count(d, w, n)[0],), "must be 2 things"),
    Answer(check.bytes_by_hand, "no return", (lambda d, w, n: None,), "is a `return` missing"),
]

# -- 9.2 -------------------------------------------------------------------------------------------------


def time_of(lm: float = 2, sae: float = 12, apiece: bool = False, rate: float = 0.4, hour: float = 3600) -> Any:
    def answer(tokens: float, weights_below: float, d_in: int, widths: list[int], flops: float) -> float:
        harvest = lm * weights_below * (len(widths) if apiece else 1)
        return tokens * (harvest + sum(sae * d_in * width for width in widths)) / (rate * flops) / hour

    return answer


def time_in_steps(tokens: float, weights_below: float, d_in: int, widths: list[int], flops: float) -> Tensor:
    seconds = torch.tensor(2.0 * weights_below * tokens / flops)
    for width in widths:
        for _ in ("W_enc", "W_dec"):
            seconds += (2 + 4) * d_in * width * tokens / flops
    return seconds / 0.4 / 60 / 60


HOURS = [
    Answer(check.hours_by_hand, "stub", (stub,), "not attempted"),
    Answer(check.hours_by_hand, "arithmetic", (time_of(),), None),
    Answer(check.hours_by_hand, "matrix by matrix", (time_in_steps,), None),
    Answer(check.hours_by_hand, "the model learns", (time_of(lm=6),), "does not learn"),
    Answer(check.hours_by_hand, "forward only", (time_of(sae=4),), "The SAE learns"),
    Answer(check.hours_by_hand, "one matrix", (time_of(sae=6),), "Either a matrix or the gradients"),
    Answer(check.hours_by_hand, "a harvest for each", (time_of(apiece=True),), "share the harvest"),
    Answer(check.hours_by_hand, "the data sheet", (time_of(rate=1),), "data sheet"),
    Answer(check.hours_by_hand, "times .4", (lambda *a: 0.16 * time_of()(*a),), "below the line"),
    Answer(check.hours_by_hand, "seconds", (time_of(hour=1),), "That is seconds"),
    Answer(check.hours_by_hand, "minutes", (time_of(hour=60),), "is right"),
    Answer(check.hours_by_hand, "the first width", (lambda t, b, d, w, f: time_of()(t, b, d, w[:1], f),), "is right"),
    Answer(check.hours_by_hand, "no harvest", (lambda t, b, d, w, f: time_of()(t, 0, d, w, f),), "is right"),
]

# -- 9.3 -------------------------------------------------------------------------------------------------


class Loop:
    """As in the notebook: a training loop that holds all that its next step depends on."""

    def __init__(self, seed: int):
        self.data = torch.randn(512, 8, generator=torch.Generator().manual_seed(seed))
        self.order = torch.Generator().manual_seed(seed + 1)
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.adam = torch.optim.Adam([self.weight])
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x = self.data[torch.randint(len(self.data), (16,), generator=self.order)]
            self.adam.param_groups[0]["lr"] = 0.1 / (1 + self.step)
            loss = (x @ self.weight - x[:, 0] * x[:, 1]).square().mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            self.step += 1


def save_all(loop: Loop) -> dict[str, Any]:
    kept = {"weight": loop.weight.detach(), "adam": loop.adam.state_dict()}
    return copy.deepcopy(kept) | {"step": loop.step, "order": loop.order.get_state()}


def load_all(loop: Loop, state: dict[str, Any]) -> None:
    with torch.no_grad():
        loop.weight.copy_(state["weight"])
    loop.adam.load_state_dict(state["adam"])
    loop.step = state["step"]
    loop.order.set_state(state["order"])


def save_file(loop: Loop) -> dict[str, Any]:
    """Through a file: what is written does not change any more."""
    file = io.BytesIO()
    torch.save([loop.weight.data, loop.adam.state_dict(), loop.step, loop.order.get_state()], file)
    return {"file": file.getvalue()}


def load_file(loop: Loop, state: dict[str, Any]) -> None:
    loop.weight.data, adam, loop.step, order = torch.load(io.BytesIO(state["file"]))
    loop.adam.load_state_dict(adam)
    loop.order.set_state(order)


def save_alive(loop: Loop) -> dict[str, Any]:
    kept = {"weight": loop.weight.detach(), "adam": loop.adam.state_dict()}
    return kept | {"step": loop.step, "order": loop.order.get_state()}


def save_alive_adam(loop: Loop) -> dict[str, Any]:
    return save_all(loop) | {"adam": loop.adam.state_dict()}


def without(*forgotten: str) -> Any:
    def load(loop: Loop, state: dict[str, Any]) -> None:
        fresh = Loop(1)
        load_all(loop, save_all(fresh) | {name: part for name, part in state.items() if name not in forgotten})

    return load


def load_only_moments(loop: Loop, state: dict[str, Any]) -> None:
    """Adam's moments come back, the number of its steps does not."""
    load_all(loop, state)
    for of_one in loop.adam.state.values():
        of_one["step"] = torch.tensor(0.0)


def load_another(loop: Loop, state: dict[str, Any]) -> None:
    load_all(loop, state)
    loop.weight = torch.nn.Parameter(state["weight"].clone())


def load_recounted(loop: Loop, state: dict[str, Any]) -> None:
    """Without the state of the generator: draws as many batches again, and throws them away."""
    load_all(loop, state | {"order": loop.order.get_state()})
    for _ in range(loop.step):
        torch.randint(len(loop.data), (16,), generator=loop.order)


def save_loop(loop: Loop) -> Any:
    return {"loop": loop}


def load_loop(loop: Loop, state: dict[str, Any]) -> None:
    load_all(loop, save_all(state["loop"]))


RESUME = [
    Answer(check.resume, "stub", (Loop, stub, stub), "not attempted"),
    Answer(check.resume, "a stub for one of two", (Loop, save_all, stub), "not attempted"),
    Answer(check.resume, "copies", (Loop, save_all, load_all), None),
    Answer(check.resume, "a file", (Loop, save_file, load_file), None),
    Answer(check.resume, "batches drawn again", (Loop, save_all, load_recounted), None),
    Answer(check.resume, "no copies", (Loop, save_alive, load_all), "went on training"),
    Answer(check.resume, "Adam not copied", (Loop, save_alive_adam, load_all), "went on training"),
    Answer(check.resume, "the loop itself", (Loop, save_loop, load_loop), "went on training"),
    Answer(check.resume, "no weight", (Loop, save_all, without("weight")), "The weight is not"),
    Answer(check.resume, "no Adam", (Loop, save_all, without("adam")), "Adam's memory is missing"),
    Answer(check.resume, "no steps of Adam", (Loop, save_all, load_only_moments), "Adam's memory is missing"),
    Answer(check.resume, "no step", (Loop, save_all, without("step")), "its schedule again"),
    Answer(check.resume, "no order", (Loop, save_all, without("order")), "They come once more"),
    Answer(check.resume, "weight and step only", (Loop, save_all, without("adam", "order")), "Adam's memory"),
    Answer(check.resume, "nothing", (Loop, save_all, lambda loop, state: None), "The weight is not"),
    Answer(check.resume, "another parameter", (Loop, save_all, load_another), "does Adam step the tensor"),
    Answer(check.resume, "no return", (Loop, lambda loop: None, load_all), "is a `return` missing"),
]

# -- 9.4 -------------------------------------------------------------------------------------------------


def send_topk(z: Tensor, budget: int) -> Tensor:
    return z.flatten().topk(budget, sorted=False).values


def send_list(z: Tensor, budget: int) -> list[float]:
    return sorted(z.flatten().tolist())[-budget:]


def bar_topk(sent: list[Tensor], budget: int) -> Tensor:
    kept = torch.cat(sent).topk(budget).values
    return kept[kept > 0].min()


def bar_list(sent: list[Any], budget: int) -> float:
    together = sorted((float(v) for values in sent for v in values), reverse=True)
    return [v for v in together[:budget] if v > 0][-1]


def bar_zero(sent: list[Tensor], budget: int) -> Tensor:
    return torch.cat(sent).topk(budget).values.min()


def each_bar(reduce: Any) -> Any:
    return lambda sent, budget: float(reduce(torch.stack([values.min() for values in sent])))


def send_share(z: Tensor, budget: int) -> Tensor:
    """Half of the budget: of two ranks, each one's own share."""
    return z.flatten().topk(budget // 2).values


ONE_CUT = [
    Answer(check.one_cut, "stub", (stub, stub), "not attempted"),
    Answer(check.one_cut, "a stub for one of two", (send_topk, stub), "not attempted"),
    Answer(check.one_cut, "topk", (send_topk, bar_topk), None),
    Answer(check.one_cut, "lists", (send_list, bar_list), None),
    Answer(check.one_cut, "everything", (lambda z, budget: z.flatten(), bar_topk), "A rank sends too much"),
    Answer(check.one_cut, "the share", (send_share, bar_topk), "its share of the budget only"),
    Answer(check.one_cut, "the mean", (send_topk, each_bar(torch.mean)), "average the bars"),
    Answer(check.one_cut, "the smallest sent", (send_topk, each_bar(torch.min)), "smallest number that was sent"),
    Answer(check.one_cut, "the highest", (send_topk, each_bar(torch.max)), "highest of the ranks' bars"),
    Answer(check.one_cut, "zeros kept", (send_topk, bar_zero), "What is 0 is not kept"),
    Answer(check.one_cut, "one too few", (lambda z, budget: send_topk(z, budget - 1), bar_list), "is right"),
    Answer(check.one_cut, "the smallest", (lambda z, budget: z.flatten().sort().values[:budget], bar_topk), "is right"),
    Answer(check.one_cut, "the largest", (send_topk, lambda sent, budget: torch.cat(sent).max()), "is right"),
    Answer(check.one_cut, "a matrix", (lambda z, budget: z, bar_topk), "is right"),
]

# -- 9.5 -------------------------------------------------------------------------------------------------


def fold(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, mean: Tensor, scale: float) -> Any:
    return W_enc / scale, b_enc, W_dec * scale, b_dec * scale + mean


def fold_double(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, mean: Tensor, scale: float) -> Any:
    """In float64, as a list, and the bias by running the decoder on nothing."""
    nothing = mean.double() + scale * (torch.zeros(len(W_dec)).double() @ W_dec.double() + b_dec.double())
    return [W_enc.double() * (1 / scale), b_enc, scale * W_dec.double(), nothing]


def folded(enc: Any, dec: Any, bias: Any) -> Any:
    return lambda W, b, D, c, m, s: (W * s**enc, b, D * s**dec, bias(c, m, s))


def right_bias(c: Tensor, m: Tensor, s: float) -> Tensor:
    return c * s + m


def fold_in_place(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, mean: Tensor, scale: float) -> Any:
    W_enc /= scale
    W_dec *= scale
    return W_enc, b_enc, W_dec, b_dec * scale + mean


FOLD = [
    Answer(check.folded_away, "stub", (stub,), "not attempted"),
    Answer(check.folded_away, "a tuple", (fold,), None),
    Answer(check.folded_away, "float64, a list", (fold_double,), None),
    Answer(check.folded_away, "the wrong way", (folded(1, -1, right_bias),), "go the wrong way"),
    Answer(check.folded_away, "encoder left", (folded(0, 1, right_bias),), "W_enc is as it was"),
    Answer(check.folded_away, "decoder left", (folded(-1, 0, right_bias),), "W_dec is as it was"),
    Answer(check.folded_away, "b_dec left", (folded(-1, 1, lambda c, m, s: c + m),), "before the mean is added"),
    Answer(check.folded_away, "no mean", (folded(-1, 1, lambda c, m, s: c * s),), "The mean is missing"),
    Answer(check.folded_away, "mean scaled", (folded(-1, 1, lambda c, m, s: (c + m) * s),), "in raw units already"),
    Answer(check.folded_away, "mean taken off", (folded(-1, 1, lambda c, m, s: c * s - m),), "is right"),
    Answer(check.folded_away, "nothing", (folded(0, 0, lambda c, m, s: c),), "is right"),
    Answer(check.folded_away, "in place", (fold_in_place,), "changes the tensor"),
    Answer(check.folded_away, "no b_enc", (lambda W, b, D, c, m, s: fold(W, b, D, c, m, s)[::2],), "must be 4 things"),
]

ANSWERS = BYTES + HOURS + RESUME + ONE_CUT + FOLD
