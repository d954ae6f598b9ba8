# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Merging of task tensors against the definitions of the papers, written out entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

from peft.utils import merge_utils as merge


@pytest.fixture
def tasks() -> list[torch.Tensor]:
    return [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]


WEIGHTS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def _elect_and_mean(trimmed: list[torch.Tensor], method: str) -> torch.Tensor:
    """TIES after trimming, one entry at a time."""
    out = torch.zeros_like(trimmed[0])
    for at in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        values = [task[tuple(at)].item() for task in trimmed]
        votes = values if method == "total" else [math.copysign(1, v) if v else 0 for v in values]
        sign = 1 if sum(votes) >= 0 else -1
        kept = [w * v for w, v in zip(WEIGHTS.tolist(), values, strict=True) if v * sign > 0]
        out[tuple(at)] = sum(kept) / len(kept) if kept else 0
    return out


def test_weights_get_trailing_dimensions(tasks):
    assert merge.reshape_weight_task_tensors(torch.stack(tasks), WEIGHTS).shape == (3, 1, 1)


def test_task_arithmetic(tasks):
    torch.testing.assert_close(merge.task_arithmetic(tasks, WEIGHTS), 0.5 * tasks[0] - tasks[1] + 2 * tasks[2])


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9])
def test_magnitude_pruning_keeps_the_largest(tasks, density):
    pruned = merge.prune(tasks[0], density, "magnitude")
    kept = pruned != 0
    count = int(density * 24)
    assert kept.sum() == count
    assert torch.equal(pruned[kept], tasks[0][kept])
    if 0 < count < 24:
        assert tasks[0][kept].abs().min() >= tasks[0][~kept].abs().max()


def test_density_one_changes_nothing(tasks):
    assert torch.equal(merge.prune(tasks[0], 1.0, "magnitude"), tasks[0])
    assert torch.equal(merge.prune(tasks[0], 1.0, "random", rescale=True), tasks[0])


def test_random_pruning_keeps_the_expectation():
    tensor = torch.ones(100_000)
    kept = merge.prune(tensor, 0.3, "random", rescale=True)
    assert abs(kept.mean() - 1) < 0.02
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.3)]
    assert merge.prune(tensor, 0.3, "random").unique().tolist() == [0.0, 1.0]


def test_density_zero_is_zero(tasks):
    assert not merge.dare_linear(tasks, WEIGHTS, 0.0).any()
    assert not merge.dare_ties(tasks, WEIGHTS, 0.0).any()


@pytest.mark.parametrize("density", [-0.1, 1.5])
def test_density_out_of_range(tasks, density):
    with pytest.raises(ValueError, match=f"density={density}"):
        merge.prune(tasks[0], density, "magnitude")


def test_unknown_methods(tasks):
    with pytest.raises(ValueError, match="method='largest'"):
        merge.prune(tasks[0], 0.5, "largest")
    with pytest.raises(ValueError, match="method='mean'"):
        merge.calculate_majority_sign_mask(torch.stack(tasks), method="mean")


def test_magnitude_prune(tasks):
    pruned = [merge.magnitude_based_pruning(task, 0.5) for task in tasks]
    torch.testing.assert_close(merge.magnitude_prune(tasks, WEIGHTS, 0.5), merge.task_arithmetic(pruned, WEIGHTS))


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties(tasks, density, method):
    tasks[0][0, 0] = tasks[1][0, 0] = tasks[2][0, 0] = 0
    trimmed = [merge.prune(task, density, "magnitude") for task in tasks]
    truth = _elect_and_mean(trimmed, method)
    torch.testing.assert_close(merge.ties(tasks, WEIGHTS, density, method), truth)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_dare(tasks, method):
    torch.manual_seed(1)
    dropped = [merge.random_pruning(task, 0.6, rescale=True) for task in tasks]
    torch.manual_seed(1)
    torch.testing.assert_close(merge.dare_linear(tasks, WEIGHTS, 0.6), merge.task_arithmetic(dropped, WEIGHTS))
    torch.manual_seed(1)
    torch.testing.assert_close(merge.dare_ties(tasks, WEIGHTS, 0.6, method), _elect_and_mean(dropped, method))


@pytest.mark.parametrize("function", [merge.ties, merge.dare_ties, merge.magnitude_prune, merge.dare_linear])
def test_dtype_is_kept(tasks, function):
    half = [task.to(torch.bfloat16) for task in tasks]
    assert function(half, WEIGHTS.to(torch.bfloat16), 0.5).dtype == torch.bfloat16
