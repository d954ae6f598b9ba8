# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What passes know of each other that were captured into a CUDA graph: their replays compare digests and keep norms on the
device alone, since the host, which lets other passes take turns, does not run."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch

SLOTS = 3  # digests of the last pass, of this one, and the zeros that the next one adds to
CAPTURED_SLOT = 1  # the one of this pass where passes cannot take turns


class Memory(NamedTuple):
    """What one pass leaves to the next.

    Args:
        digests: `[SLOTS, members]`. Passes take turns with the slots; those of captured ones have `CAPTURED_SLOT`.
        norms: The norms that belong to the last digests.
    """

    digests: torch.Tensor
    norms: torch.Tensor


# Nobody tells when a graph is gone: what its launches read stays, with their table. It is some 10 bytes a row of a weight.
_captured: dict[int, tuple[Memory, torch.Tensor]] = {}


def note_captured(memory: Memory, table: torch.Tensor) -> None:
    """Keep what a captured launch reads for as long as it may be replayed."""
    _captured[id(table)] = memory, table


def expire_captured() -> None:
    """Let the next replay of every captured pass compute its norms."""
    for memory, _ in _captured.values():
        memory.digests.zero_()


def advance(digests: torch.Tensor) -> None:
    """Let the digests of this captured pass be the last ones, and zeros those that the next one adds to."""
    last, now = digests[CAPTURED_SLOT - 1], digests[CAPTURED_SLOT]
    last.copy_(now)
    now.zero_()


def tabulate(entries: list[int], owners: list[int], device: torch.device) -> torch.Tensor:
    """`entries + owners` as int64 on `device`, by launches alone: under capture no memory of the host may be read."""
    table = torch.zeros(len(entries) + len(owners), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table[: len(entries)].unbind()), entries)
    place = len(entries)
    for owner, run in groupby(owners):
        size = len(list(run))
        if owner:
            table[place : place + size].fill_(owner)
        place += size
    return table
