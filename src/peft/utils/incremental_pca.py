# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Principal components of data that arrives in batches (Ross, Lim, Lin and Yang 2008, "Incremental Learning for Robust
Visual Tracking"), on the data's device; EVA initialises LoRA with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch


class IncrementalPCA:
    """Keeps the leading components of everything seen, and nothing of the data itself.

    All results are float64, whatever the data's dtype.

    Args:
        n_components: Components to keep; None for as many as the first batch can give.
        copy: Leave the data given to `partial_fit` unchanged; if not, float64 batches are centred in place.
        batch_size: Rows that `fit` takes at a time; None for five times the number of features.
        svd_driver: cuSOLVER driver, for CUDA data only.
        lowrank: Use randomised SVD (Halko, Martinsson and Tropp 2011), which is much faster for few components.
        lowrank_q: Size of the random projection; None for twice `n_components`.
        lowrank_niter: Its power iterations.
        lowrank_seed: Seed of its random numbers; the generators outside stay as they are.

    Raises:
        ValueError: `lowrank` without `n_components` or `lowrank_q`, or with `lowrank_q` below `n_components`.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("lowrank=True needs n_components or lowrank_q: set one of them.")
            lowrank_q = 2 * n_components
        if lowrank and n_components is not None and lowrank_q < n_components:
            raise ValueError(f"lowrank_q={lowrank_q} must be at least n_components={n_components}.")
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q = lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_features_: int | None = None

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices that cover `n` rows; a rest of less than `min_batch_size` rows goes with the slice before it."""
        start = 0
        while start < n:
            end = start + batch_size
            if end + min_batch_size > n:
                end = n
            yield slice(start, end)
            start = end

    def fit(self, X: torch.Tensor, check_input: bool = True) -> IncrementalPCA:
        """Forget what was seen and fit `X` `[samples, features]`, batch by batch.

        Args:
            X: Data.
            check_input: Check it first.

        Raises:
            ValueError: As `partial_fit`.
        """
        if check_input:
            X = self._validated(X)
        self.n_features_ = None
        if self.batch_size is None:
            self.batch_size = 5 * X.shape[1]
        for rows in self.gen_batches(len(X), self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[rows], check_input=False)
        return self

    @torch.no_grad()
    def partial_fit(self, X: torch.Tensor, check_input: bool = True) -> IncrementalPCA:
        """Take one more batch `[samples, features]` into account.

        Args:
            X: Data.
            check_input: Check it first.

        Raises:
            ValueError: The data is not a matrix, its number of features changed, or there are fewer samples or
                features than components.
        """
        if check_input:
            X = self._validated(X)
        first = self.n_features_ is None
        if first:
            self._begin(X)
        elif X.shape[1] != self.n_features_:
            raise ValueError(f"The batch has {X.shape[1]} features, but the first one had {self.n_features_}.")

        seen, new = int(self.n_samples_seen_), len(X)
        total = seen + new
        data = X.to(torch.float64, copy=bool(self.copy))
        mean = data.mean(dim=0)
        shift = mean - self.mean_
        # sums of squares of both parts about their own means, and what moving these to the common mean adds
        squares = self.var_ * seen + (data - mean).square().sum(dim=0) + shift.square() * (seen * new / total)
        rows = data.sub_(mean)
        if not first:
            step = (seen * new / total) ** 0.5 * -shift
            rows = torch.cat([self.singular_values_[:, None] * self.components_, rows, step[None]])
        singular, components = self._svd(rows)

        kept = self.n_components
        variance = singular.square() / max(total - 1, 1)
        self.mean_ = self.mean_ + shift * (new / total)
        self.var_ = squares / total
        self.n_samples_seen_ = self.n_samples_seen_ + new
        self.components_, self.singular_values_ = components[:kept], singular[:kept]
        self.explained_variance_ = variance[:kept]
        self.explained_variance_ratio_ = singular[:kept].square() / squares.sum()
        rest = variance[kept : min(total, self.n_features_)]
        self.noise_variance_ = rest.mean() if len(rest) else rest.new_zeros(())
        return self

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        """Coordinates `[samples, n_components]`, float64, of data `[samples, features]` along the components."""
        return (X.to(self.mean_) - self.mean_) @ self.components_.T

    # ---- steps ---------------------------------------------------------------------------------------------------
    def _begin(self, X: torch.Tensor) -> None:
        samples, features = X.shape
        components = min(samples, features) if self.n_components is None else self.n_components
        if not 1 <= components <= features:
            raise ValueError(f"n_components={components} must lie between 1 and the number of features, {features}.")
        if components > samples:
            raise ValueError(
                f"n_components={components} needs as many samples in the first batch, which has {samples}."
            )
        self.n_components, self.n_features_ = components, features
        self.mean_ = torch.zeros(features, dtype=torch.float64, device=X.device)
        self.var_ = torch.zeros_like(self.mean_)
        self.n_samples_seen_ = torch.zeros(1, dtype=torch.int64, device=X.device)

    def _svd(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values and right singular vectors `[components, features]`, each with a fixed sign."""
        if self.lowrank:
            seeded = self.lowrank_seed is not None
            devices = [rows.device] if rows.is_cuda else []
            with torch.random.fork_rng(devices=devices) if seeded else nullcontext():
                if seeded:
                    torch.manual_seed(self.lowrank_seed)
                _, singular, v = torch.svd_lowrank(rows, q=min(self.lowrank_q, *rows.shape), niter=self.lowrank_niter)
            components = v.T
        else:
            _, singular, components = torch.linalg.svd(rows, full_matrices=False, driver=self.svd_driver)
        largest = components.abs().argmax(dim=1, keepdim=True)
        return singular, components * components.gather(1, largest).sign()

    def _validated(self, X: torch.Tensor) -> torch.Tensor:
        X = X if isinstance(X, torch.Tensor) else torch.tensor(X)
        if X.dim() != 2:
            raise ValueError(f"X has the shape {list(X.shape)}, but must be a matrix [samples, features].")
        return X if X.is_floating_point() else X.to(torch.float32)
