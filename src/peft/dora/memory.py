# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A pass that ran out of memory, once more in chunks of its tokens. All that a pass keeps is made anew or left alone, so
nothing of the failed one is in the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from peft.utils.warning import PeftWarning

CHUNKS = 8

Tensors = tuple[torch.Tensor | None, ...]


def note(error: torch.OutOfMemoryError, x: torch.Tensor) -> None:
    """Warn that a pass over x `[..., features]` is to be tried again.

    Call it while handling `error`, and try again after that: a live traceback would hold what the failed pass made.

    Raises:
        torch.OutOfMemoryError: `error`, where x has one token only and cannot be split.
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens < 2:
        raise error
    warnings.warn(
        f"Out of memory in a DoRA pass over {tokens} tokens: it is tried once more in {min(CHUNKS, tokens)} chunks, "
        "which is slower. A smaller batch or gradient checkpointing avoids it.",
        PeftWarning,
        stacklevel=3,
    )


def forward_in_chunks(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`run(x)` `[..., out]` from `run` on some rows of x `[..., in]` at a time; the gradient goes through each."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.cat([run(part) for part in rows.chunk(CHUNKS)])
    return y.view(*x.shape[:-1], y.shape[-1])


def backward_in_chunks(run: Callable[..., Tensors], tensors: Sequence[torch.Tensor | None]) -> Tensors:
    """The gradients of a pass from those of some tokens at a time.

    Args:
        run: Takes `tensors`, each restricted to the same tokens, and gives the input's gradient `[tokens, in]` first,
            then gradients that are sums over tokens. None where there is none.
        tensors: `[..., features]` each, or None.
    """
    rows = [None if each is None else each.reshape(-1, each.shape[-1]) for each in tensors]
    tokens = next(len(each) for each in rows if each is not None)
    step = -(-tokens // CHUNKS)
    inputs, sums = [], None
    for start in range(0, tokens, step):
        first, *rest = run(*(None if each is None else each[start : start + step] for each in rows))
        inputs.append(first)
        sums = rest if sums is None else [a if a is None else a + b for a, b in zip(sums, rest, strict=True)]
    return None if inputs[0] is None else torch.cat(inputs), *sums
