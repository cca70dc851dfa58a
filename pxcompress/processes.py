"""Runs several processes on one job: each gets a share of the data, sums are added up, the first one writes.

`torchrun --nproc-per-node 2 -m pxcompress run ...` or `accelerate launch -m pxcompress run ...` start them and set
RANK, WORLD_SIZE and LOCAL_RANK. In a single process nothing here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pxcompress.errors import DataError, ProcessError
from pxcompress.types import Batch, Batches

PATIENCE = timedelta(hours=12)
"""How long a process waits for another one, since the first may have to train a baseline in the meantime."""


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _are_joined() else 0


def processes() -> int:
    """Number of processes that work on this job, 1 if it is alone."""
    return dist.get_world_size() if _are_joined() else 1


def is_first() -> bool:
    """Whether this is the process that plans, writes and prints."""
    return rank() == 0


@contextmanager
def join_processes() -> Iterator[None]:
    """A context in which this process works together with the others that a launcher has started, if any.

    Raises `ProcessError` if one of them has ended; its own message says why.
    """
    if _are_joined() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield
        return
    dist.init_process_group(_choose_device(), timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _choose_device() -> str:
    """Assign a GPU to this process if there is one.

    Returns the backend for communication, since NCCL needs one GPU each.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return "gloo"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    return "cpu:gloo,cuda:nccl" if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus else "gloo"


@contextmanager
def _raise_process_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(f"process {rank()} has lost another process of this run ({str(error)[:80]})") from error


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, which must all call this in the same order; `value` is not changed."""
    if not _are_joined():
        return value
    total = value.detach().clone()
    with _raise_process_errors():
        dist.all_reduce(total)
    return total


def gather_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of `parts` of all processes, in their order, on the CPU.

    Every process must call this, also without rows.
    """
    own_rows = torch.cat(list(parts)).cpu() if parts else torch.empty(0)
    if not _are_joined():
        return own_rows
    everyone: list[Any] = [None] * processes()
    with _raise_process_errors():
        dist.all_gather_object(everyone, own_rows)
    rows = [each for each in everyone if len(each)]
    return torch.cat(rows) if rows else own_rows


@dataclass(frozen=True)
class _Share:
    """Every `of`-th batch, starting with number `place`.

    Whole batches, so that BatchNorm sees the same as in one process.
    """

    batches: Batches
    place: int
    of: int

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.batches, self.place, None, self.of)


def share_parts(parts: Mapping[str, Batches]) -> dict[str, Batches]:
    """This process's share of each part of the data; all of it if it is alone.

    Raises `DataError` for an empty share.
    """
    if processes() == 1:
        return dict(parts)
    own_shares: dict[str, Batches] = {role: _Share(part, rank(), processes()) for role, part in parts.items()}
    for role, part in own_shares.items():
        if next(iter(part), None) is None:
            raise DataError(f"role {role!r} has no batch for process {rank()}; use fewer than {processes()} processes")
    return own_shares


def from_first(value: Any) -> Any:
    """The `value` of the first process, sent to all; it must be possible to pickle it."""
    if not _are_joined():
        return value
    box = [value]
    with _raise_process_errors():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def mean_gradients_(model: nn.Module) -> None:
    """Replace every gradient of `model` by its mean over all processes."""
    if _are_joined():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = sum_over_processes(parameter.grad) / processes()


def same_weights_(model: nn.Module) -> None:
    """Set the parameters and buffers of `model` to the values in the first process, in place."""
    if not _are_joined():
        return
    with torch.no_grad(), _raise_process_errors():
        for value in (*model.parameters(), *model.buffers()):
            dist.broadcast(value.data, src=0)
