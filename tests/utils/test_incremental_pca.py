# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Incremental PCA against the singular value decomposition of all data at once, in float64."""

from __future__ import annotations

import pytest
import torch

from peft.utils.incremental_pca import IncrementalPCA


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(60, 8) * torch.arange(1, 9) + 3


def _truth(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    centred = data.double() - data.double().mean(dim=0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    largest = components.abs().argmax(dim=1, keepdim=True)
    return singular, components * components.gather(1, largest).sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_batch_is_exact(data, dtype):
    data = data.to(dtype)
    singular, components = _truth(data)
    pca = IncrementalPCA(n_components=3).partial_fit(data)
    torch.testing.assert_close(pca.singular_values_, singular[:3])
    torch.testing.assert_close(pca.components_, components[:3])
    torch.testing.assert_close(pca.mean_, data.double().mean(dim=0))
    torch.testing.assert_close(pca.var_, data.double().var(dim=0, correction=0))
    torch.testing.assert_close(pca.explained_variance_, singular[:3] ** 2 / 59)
    torch.testing.assert_close(pca.explained_variance_ratio_, singular[:3] ** 2 / (singular**2).sum())
    torch.testing.assert_close(pca.noise_variance_, (singular[3:] ** 2 / 59).mean())
    centred = data.double() - data.double().mean(dim=0)
    torch.testing.assert_close(pca.transform(data), centred @ components[:3].T)


@pytest.mark.parametrize("batches", [[20, 20, 20], [10, 1, 2, 40, 7]])
def test_batches_lose_nothing_when_all_components_are_kept(data, batches):
    singular, components = _truth(data)
    pca = IncrementalPCA(n_components=8)
    for batch in data.split(batches):
        pca.partial_fit(batch)
    torch.testing.assert_close(pca.singular_values_, singular)
    torch.testing.assert_close(pca.components_, components)
    torch.testing.assert_close(pca.mean_, data.double().mean(dim=0))
    torch.testing.assert_close(pca.var_, data.double().var(dim=0, correction=0))
    assert pca.n_samples_seen_ == 60
    assert pca.noise_variance_ == 0


def test_low_rank_data_is_found_in_small_batches():
    data = torch.randn(100, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    singular, components = _truth(data)
    pca = IncrementalPCA(n_components=4, batch_size=10).fit(data)
    torch.testing.assert_close(pca.singular_values_[:3], singular[:3])
    torch.testing.assert_close(pca.components_[:3], components[:3])


def test_randomised_svd(data):
    singular, _ = _truth(data)
    state = torch.get_rng_state()
    first = IncrementalPCA(n_components=3, lowrank=True, lowrank_seed=0).fit(data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    second = IncrementalPCA(n_components=3, lowrank=True, lowrank_seed=0).fit(data)
    assert torch.equal(first.components_, second.components_)
    torch.testing.assert_close(first.singular_values_, singular[:3], rtol=0.02, atol=0)
    assert first.lowrank_q == 6


def test_fit_starts_anew(data):
    pca = IncrementalPCA(n_components=2)
    pca.fit(data + 100)
    pca.fit(data)
    torch.testing.assert_close(pca.mean_, data.double().mean(dim=0))
    assert pca.n_samples_seen_ == 60
    assert pca.batch_size == 40


@pytest.mark.parametrize(
    ("n", "size", "least", "expected"),
    [
        (10, 3, 0, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (10, 3, 2, [(0, 3), (3, 6), (6, 10)]),
        (7, 3, 2, [(0, 3), (3, 7)]),
        (9, 3, 1, [(0, 3), (3, 6), (6, 9)]),
    ],
)
def test_batches(n, size, least, expected):
    assert [(rows.start, rows.stop) for rows in IncrementalPCA.gen_batches(n, size, least)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_data_is_left_alone(data, dtype):
    data = data.to(dtype)
    before = data.clone()
    IncrementalPCA(2).fit(data)
    assert torch.equal(data, before)


def test_lists_and_integers_are_taken():
    pca = IncrementalPCA(1).fit([[1, 2], [3, 5]])
    assert pca.components_.shape == (1, 2)


def test_refusals(data):
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        IncrementalPCA(1).fit(torch.ones(3))
    with pytest.raises(ValueError, match="n_components=9 must lie between 1 and the number of features, 8"):
        IncrementalPCA(9).fit(data)
    with pytest.raises(ValueError, match="n_components=0"):
        IncrementalPCA(0).fit(data)
    with pytest.raises(ValueError, match="as many samples in the first batch, which has 3"):
        IncrementalPCA(5).partial_fit(data[:3])
    with pytest.raises(ValueError, match="4 features, but the first one had 8"):
        IncrementalPCA(2).partial_fit(data).partial_fit(data[:, :4])
    with pytest.raises(ValueError, match="lowrank=True needs"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ValueError, match="lowrank_q=2 must be at least n_components=4"):
        IncrementalPCA(4, lowrank=True, lowrank_q=2)
