# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A batch whose rows have different adapters, without gradient: one base product, and a pass over each adapter's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .call import Call, find_call
from .factors import Factors, NormCache
from .norm import check_factors
from .products import as_dtype
from .route import Route

# Up to here each adapter's few rows are multiplied by W on their own, which saves launches; from there on once for all.
FEW_GROUPS = 2


class Group(NamedTuple):
    """Consecutive rows of a batch that have one adapter; its arguments are those of `peft.dora.linear`.

    Args:
        rows: Which.
        A: None for rows without an adapter, as all that follows.
        B, scaling, magnitude, lora_bias, cache, route: As there.
    """

    rows: slice
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None
    cache: NormCache | None = None
    route: Route | None = None


@torch.no_grad()
def linear_of_groups(x: torch.Tensor, weight: Any, groups: Sequence[Group]) -> torch.Tensor:
    """`peft.dora.linear` for several adapters, each on rows of its own; no gradient is recorded.

    W is multiplied once (for two adapters on few rows, twice), so that further ones cost two launches each.

    Args:
        x: `[batch, ..., in]`.
        weight: W `[out, in]` and its bias, as a `peft.weights.BaseWeight`.
        groups: Together they have every row once, and at least one has an adapter.

    Returns:
        `[batch, ..., out]` in the dtype that the base layer alone would return.

    Raises:
        ValueError: The shapes of x, A or B do not fit the weight's.
    """
    calls = [_call(x, weight, group) for group in groups]
    factors = [
        None if call is None else call.factors(group.A, group.B, group.magnitude, floor=False)
        for call, group in zip(calls, groups, strict=True)
    ]
    first = next(call for call in calls if call is not None)
    for call, found in zip(calls, factors, strict=True):
        if call is not None:
            call.use(found.packed)
    x = as_dtype(x, first.dtype).contiguous()
    bias = weight.bias
    small = first.small_weight(x) if len(groups) <= FEW_GROUPS and None not in calls else None
    if small is not None:
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for call, found, group in zip(calls, factors, groups, strict=True):
            call.run_small(x[group.rows], small, found, group.lora_bias, bias, y[group.rows])
        return y
    y, _ = first.products(x, None)
    for call, found, group in zip(calls, factors, groups, strict=True):
        part = y[group.rows]
        if call is not None:
            _add_branch(part, x[group.rows], call, found, group, bias)
        if bias is not None and (call is None or found.stats is None):
            part.add_(as_dtype(bias, part.dtype))
    return y


def _call(x: torch.Tensor, weight: Any, group: Group) -> Call | None:
    if group.A is None:
        return None
    check_factors(weight, group.A, group.B)
    return find_call(x, weight, group.A, group.B, group.scaling, group.cache, group.route)


def _add_branch(
    y: torch.Tensor, x: torch.Tensor, call: Call, factors: Factors, group: Group, bias: torch.Tensor | None
) -> None:
    """Make of the base product y what the adapter makes of it, in place; the bias comes with a gain only."""
    made = call.body.compose(
        y,
        F.linear(as_dtype(x, call.branch_dtype), factors.a),
        factors.b,
        stats=factors.stats,
        bias=None if factors.stats is None else bias,
        lora_bias=group.lora_bias,
        scaling=call.scaling,
        launches=call.launches,
    )[0]
    if made.data_ptr() != y.data_ptr():
        y.copy_(made)
