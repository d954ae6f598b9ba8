# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MonteCLoRA's sampler (Sengupta et al., arXiv 2411.04358): A plus a mixture of Gaussian samples, Aᵀ + Σₖ πₖ vₖ.

The samples vₖ `[in, r]` have rows from N(0, Σ) with Σ from a Wishart distribution, the weights π come from a Dirichlet
distribution by its Laplace approximation in softmax's basis. What is trained is the scale of the Wishart distribution
and the concentration of the Dirichlet distribution, both as logarithms.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

_LEAST_VARIANCE = 1e-3
_LEAST_CONCENTRATION = 1e-6


class BufferedMontecloraSampler:
    """Draws what a pass of a sampler needs of randomness.

    A draw is made when it is asked for, from torch's generators alone, so that activation checkpointing, which brings
    back their state, repeats it. Nothing is drawn ahead.

    Args:
        model: The sampler to draw for.
        buffer_size: Taken for compatibility.
        device: Where to draw; None for where the sampler's parameters are.
    """

    def __init__(self, model: MontecloraSampler, buffer_size: int = 150, device: str | None = None) -> None:
        self.model = model
        self.buffer_size = buffer_size
        self.device = device

    def get(self) -> dict[str, torch.Tensor]:
        """`z_mvn` `[samples, in, r]` and `z_dirichlet` `[samples]`, standard normal, and `z_wishart` `[r, r]`, standard
        Wishart with r degrees of freedom."""
        sampler = self.model
        device = sampler.std_prior.device if self.device is None else self.device
        draw = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
        root = draw(sampler.out_features, sampler.out_features)
        return {
            "z_mvn": draw(sampler.num_samples, sampler.in_features, sampler.out_features),
            "z_wishart": root @ root.t(),
            "z_dirichlet": draw(sampler.num_samples),
        }


class MontecloraSampler(nn.Module):
    """The variational parameters of one adapter, and the samples that they give.

    Args:
        in_features: Rows of a sample: A's input features.
        out_features: Columns of a sample: the rank.
        num_samples: Samples of the mixture.
        use_entropy: Add Σ πₖ², which is least for equal weights, to the loss.
        dirichlet_prior: Concentration of the prior of the weights.
        sample_scaler: Factor of the samples.
        kl_loss_weight: Weight of the divergences from the priors.
        buffer_size: Taken for compatibility.
        device, dtype: Of the parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, num_samples: int, use_entropy: bool = True, dirichlet_prior: float = 1.0,
        sample_scaler: float = 0.0003, kl_loss_weight: float = 1e-05, buffer_size: int = 10, device: str | None = None,
        dtype: torch.dtype | None = None, **kwargs: object,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.num_samples = in_features, out_features, num_samples
        self.use_entropy, self.dirichlet_prior = use_entropy, dirichlet_prior
        self.sample_scaler, self.kl_loss_weight = sample_scaler, kl_loss_weight
        self.std_prior = nn.Parameter(torch.rand(out_features, device=device, dtype=dtype))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, device=device, dtype=dtype))
        self.register_buffer("gaussian_var_prior", torch.eye(out_features, device=device, dtype=dtype))
        weights = torch.full((num_samples,), 1 / num_samples, device=device, dtype=dtype)
        self.register_buffer("expert_weights", weights)
        self.sampler = BufferedMontecloraSampler(self, buffer_size)
        self._drawn: dict[str, torch.Tensor] | None = None

    # ---- samples -------------------------------------------------------------------------------------------------
    def wishart_reparameterization(self, std: torch.Tensor, z_wishart: torch.Tensor) -> torch.Tensor:
        """The diagonal of std Z stdᵀ as a matrix `[r, r]`, its entries at least 0.001.

        Args:
            std: A root of the scale matrix, `[r, r]`.
            z_wishart: Z `[r, r]`, from the standard Wishart distribution.
        """
        return torch.diag(((std @ z_wishart) * std).sum(1).clamp(min=_LEAST_VARIANCE))

    def multivariate_reparameterization(self, z_mvn: torch.Tensor, cov_matrix: torch.Tensor) -> torch.Tensor:
        """z L times `sample_scaler`, with the Cholesky root L of the covariance `[r, r]`.

        Args:
            z_mvn: `[samples, in, r]`, standard normal.
            cov_matrix: Covariance of a row.
        """
        return self.sample_scaler * (z_mvn @ torch.linalg.cholesky(cov_matrix))

    def dirichlet_reparameterization(self, alpha: torch.Tensor, z_dirichlet: torch.Tensor) -> torch.Tensor:
        """Logits of mixture weights: a normal variable with the mean and variance of the Laplace approximation.

        Args:
            alpha: Concentrations `[samples]`.
            z_dirichlet: `[samples]`, standard normal.
        """
        alpha = alpha.clamp(min=_LEAST_CONCENTRATION)
        count = alpha.numel()
        mean = alpha.log() - alpha.log().mean()
        variance = (1 - 2 / count) / alpha + (1 / alpha).sum() / count**2
        return mean + variance.sqrt() * z_dirichlet

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples v `[samples, in, r]` and their weights π `[samples]`."""
        drawn = self._drawn = self.sampler.get()
        variance, weights = self._variance(drawn), self._weights(drawn)
        with torch.no_grad():
            self.gaussian_var_prior.copy_(variance)
            self.expert_weights.copy_(weights)
        root = variance.diagonal().sqrt()  # L of a diagonal matrix
        return self.sample_scaler * (drawn["z_mvn"] * root), weights

    def _std(self) -> torch.Tensor:
        return torch.diag(self.std_prior.float().exp())

    def _variance(self, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.wishart_reparameterization(self._std(), drawn["z_wishart"].to(self.std_prior.device))

    def _weights(self, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        alpha = self.expert_weights_prior.float().exp()
        return torch.softmax(self.dirichlet_reparameterization(alpha, drawn["z_dirichlet"].to(alpha.device)), -1)

    # ---- losses --------------------------------------------------------------------------------------------------
    def dirichlet_kl(self, alpha2: torch.Tensor) -> torch.Tensor:
        """Divergence of the Dirichlet distribution of concentrations `alpha2` from the prior; never negative."""
        prior = torch.full_like(alpha2, self.dirichlet_prior)
        return kl_divergence(Dirichlet(alpha2.clamp(min=_LEAST_CONCENTRATION)), Dirichlet(prior))

    def wishart_kl(self, std: torch.Tensor) -> torch.Tensor:
        """Divergence of the Wishart distribution of scale std stdᵀ from the standard one, r degrees of freedom each.

        Args:
            std: A root of the scale matrix, `[r, r]`.
        """
        r = self.out_features
        return r / 2 * (std.square().sum() - r - 2 * torch.linalg.slogdet(std).logabsdet)

    def multivariate_kl(self, var: torch.Tensor) -> torch.Tensor:
        """Divergence of the samples' rows, of diagonal covariance `var` `[r, r]`, from the standard normal, summed over
        the samples."""
        variance = var.diagonal()
        return self.num_samples / 2 * (variance - 1 - variance.log()).sum()

    def get_variational_loss(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """What the last pass adds to the loss: the divergences times their weight, and Σ πₖ² or 0; zeros in evaluation."""
        if not self.training or self._drawn is None:
            return 0.0, 0.0
        divergence = (
            self.dirichlet_kl(self.expert_weights_prior.float().exp())
            + self.wishart_kl(self._std())
            + self.multivariate_kl(self._variance(self._drawn))
        )
        entropy = self._weights(self._drawn).square().sum() if self.use_entropy else 0
        return self.kl_loss_weight * divergence, entropy
