"""Many processes as one: what those that `torchrun` starts have to agree on.

Each rank has its own share of a batch. Inside `together`, and only there, statistics and BatchTopK's cut are those of
the whole batch, so that many ranks do what one process would do with their batches joined. Everywhere else, and in a
single process always, `world()` is 1 and nothing here communicates: an evaluation on one rank waits for nobody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

_together = False


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def size() -> int:
    """Processes in this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world() -> int:
    """Processes that take this step together."""
    return size() if _together else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, if `torchrun` started this one, and leave them in the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or size() > 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together(now: bool = True) -> Iterator[None]:
    """All ranks do the same within this, step by step."""
    global _together
    before, _together = _together, now
    try:
        yield
    finally:
        _together = before


def apart(really: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within `together`, what each rank does by itself."""
    return together(_together and not really)


def total(x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or another reduction, over the ranks."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x, op)
    return x


def mean(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return total(x) / world()


def any_of(x: Tensor) -> Tensor:
    """Where it is true on at least one rank."""
    return total(x.to(torch.uint8), dist.ReduceOp.MAX).bool() if world() > 1 else x


def agreed(value: Any) -> Any:
    """What rank 0 says; all ranks must ask."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """What every rank says, in order of rank; all ranks must ask."""
    if size() == 1:
        return [value]
    box: list[Any] = [None] * size()
    dist.all_gather_object(box, value)
    return box


def copy_from_first(tensors: Iterator[Tensor]) -> None:
    """Overwrite the tensors of the other ranks with those of rank 0."""
    for tensor in tensors:
        if size() > 1:
            tensor = tensor.detach()
            dist.broadcast(tensor if tensor.is_contiguous() else tensor.T, 0)


def batch_cut(values: Float[Tensor, " n"], budget: int) -> tuple[Float[Tensor, ""], Tensor]:
    """The smallest of the `budget` largest positive entries of all ranks, and how many that equal it this rank keeps.

    `values` holds at least the `budget` largest of this rank, or all it has. Ties go to the lower rank, which is the
    lower flat index of the joined batch.
    """
    mine = values.new_zeros(budget)
    largest = values.topk(min(budget, len(values)), sorted=False).values
    mine[: len(largest)] = largest.clamp(min=0)
    parts = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(parts, mine)
    everyone = torch.stack(parts)
    cut = everyone.view(-1).topk(budget, sorted=False).values.amin()
    room = budget - (everyone > cut).sum()
    return cut, (room - (everyone[: rank()] == cut).sum()).clamp(min=0)
