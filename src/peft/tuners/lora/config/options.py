# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The settings of LoRA's starts and variants, one dataclass each; `LoraConfig` holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LoraRuntimeConfig:
    """Settings of a process, never saved with an adapter.

    Args:
        ephemeral_gpu_offload: Do one-off computations of adapters on an accelerator when the weight is on the CPU.
    """

    ephemeral_gpu_offload: bool = field(default=False, metadata={"help": "One-off computations on an accelerator."})


@dataclass
class LoftQConfig:
    """LoftQ (Li et al., arXiv 2310.08659).

    Args:
        loftq_bits: Bits of the quantised weight.
        loftq_iter: Alternating steps of quantisation and low-rank fit.
    """

    loftq_bits: int = field(default=4, metadata={"help": "Bits of the quantised weight."})
    loftq_iter: int = field(default=1, metadata={"help": "Alternating steps."})


@dataclass
class EvaConfig:
    """EVA (Paischer et al., arXiv 2410.07170).

    Args:
        rho: Largest ratio of a layer's rank to `r`, at least 1.
        tau: Cosine similarity from which components count as settled, within [0, 1].
        use_label_mask: Leave positions with `label_mask_value` out.
        label_mask_value: The label of positions to leave out.
        whiten: Divide the components by their deviation.
        adjust_scaling_factors: Keep the scaling as it would be without redistributed ranks.

    Raises:
        ValueError: `rho` or `tau` is out of its range.
    """

    rho: float = field(default=2.0, metadata={"help": "Largest ratio of a layer's rank to r."})
    tau: float = field(default=0.99, metadata={"help": "Similarity from which a component is settled."})
    use_label_mask: bool = field(default=True, metadata={"help": "Leave masked positions out."})
    label_mask_value: int = field(default=-100, metadata={"help": "Label of masked positions."})
    whiten: bool = field(default=False, metadata={"help": "Divide components by their deviation."})
    adjust_scaling_factors: bool = field(default=True, metadata={"help": "Keep the scaling when ranks move."})

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"rho={self.rho} must be at least 1: a layer's rank may grow to rho · r.")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau={self.tau} must lie between 0 and 1: it is a cosine similarity.")


@dataclass
class CordaConfig:
    """CorDA (Yang et al., arXiv 2406.05223).

    Args:
        cache_file: File that keeps the decomposition.
        covariance_file: File that keeps the covariance of the inputs.
        corda_method: "ipm" to adapt to an instruction, "kpm" to preserve knowledge.
        verbose: Report each layer.
        use_float16_for_covariance: Collect the covariance in float16.
        prune_temporary_fields: Remove what was attached to the model once the adapter stands.
    """

    cache_file: str | None = field(default=None, metadata={"help": "File of the decomposition."})
    covariance_file: str | None = field(default=None, metadata={"help": "File of the covariance."})
    corda_method: Literal["ipm", "kpm"] = field(default="ipm", metadata={"help": "Adapt or preserve."})
    verbose: bool = field(default=False, metadata={"help": "Report each layer."})
    use_float16_for_covariance: bool = field(default=False, metadata={"help": "Covariance in float16."})
    prune_temporary_fields: bool = field(default=True, metadata={"help": "Remove what was attached."})


@dataclass
class LoraGAConfig:
    """LoRA-GA (Wang et al., arXiv 2407.05000).

    Args:
        direction: Which singular directions of the gradient A and B take.
        scale: How the start is scaled.
        stable_gamma: γ of the "stable" scale.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = field(
        default="ArB2r", metadata={"help": "Singular directions of A and B."}
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = field(
        default="stable", metadata={"help": "Scale of the start."}
    )
    stable_gamma: int = field(default=16, metadata={"help": "Gamma of the stable scale."})

    def __post_init__(self) -> None:
        for name, allowed in (
            ("direction", ("ArBr", "A2rBr", "ArB2r", "random")),
            ("scale", ("stable", "weight_svd", "gd_scale", "unit")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(allowed)}.")


@dataclass
class VeloraConfig:
    """VeLoRA (Miles et al., arXiv 2405.17991).

    Args:
        num_groups: Groups that a token's features are divided into.
        scale: Factor of the reconstruction.
        init_type: How the projection starts.
    """

    num_groups: int = field(default=64, metadata={"help": "Groups of a token's features."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the reconstruction."})
    init_type: str = field(default="batch_average", metadata={"help": "Start of the projection."})


@dataclass
class KasaConfig:
    """KaSA (Wang et al., arXiv 2412.06071).

    Args:
        beta: Weight of the singular values' regularisation.
        gamma: Weight of the orthogonality regularisation.
    """

    beta: float = field(default=0.0001, metadata={"help": "Weight of the singular values' term."})
    gamma: float = field(default=0.001, metadata={"help": "Weight of the orthogonality term."})


@dataclass
class MontecloraConfig:
    """MonteCLoRA (Sengupta et al., arXiv 2411.04358).

    Args:
        num_samples: Samples of the mixture.
        use_entropy: Add the entropy of the mixture's weights.
        dirichlet_prior: Concentration of their prior.
        sample_scaler: Size of the samples.
        kl_loss_weight: Weight of the divergence from the prior.
        buffer_size: Samples drawn ahead.
    """

    num_samples: int = field(default=8, metadata={"help": "Samples of the mixture."})
    use_entropy: bool = field(default=False, metadata={"help": "Add the entropy of the weights."})
    dirichlet_prior: float = field(default=0.1, metadata={"help": "Concentration of the prior."})
    sample_scaler: float = field(default=0.0001, metadata={"help": "Size of the samples."})
    kl_loss_weight: float = field(default=1e-05, metadata={"help": "Weight of the divergence."})
    buffer_size: int = field(default=150, metadata={"help": "Samples drawn ahead."})


@dataclass
class BdLoraConfig:
    """Block-diagonal LoRA (arXiv 2510.23346).

    Args:
        target_modules_bd_a: Modules whose A is block-diagonal.
        target_modules_bd_b: Modules whose B is.
        nblocks: Number of blocks.
        match_strict: Whether every adapted module must be in one of the lists.
    """

    target_modules_bd_a: list[str] | None = field(default=None, metadata={"help": "Modules with block-diagonal A."})
    target_modules_bd_b: list[str] | None = field(default=None, metadata={"help": "Modules with block-diagonal B."})
    nblocks: int = field(default=1, metadata={"help": "Number of blocks."})
    match_strict: bool = field(default=True, metadata={"help": "Every module must be listed."})


@dataclass
class ArrowConfig:
    """Arrow routing (Ostapenko et al., arXiv 2405.11157).

    Args:
        top_k: Experts that a token uses.
        router_temperature: Temperature of the router's softmax.
        use_gks: Subtract general knowledge from the experts (arXiv 2506.02177).
        task_adapter_names: The experts; filled in when the model is built.
        gks_adapter_names: Adapters that hold general knowledge; likewise.
        rng_seed: Seed of the start.
    """

    top_k: int = field(default=3, metadata={"help": "Experts that a token uses."})
    router_temperature: float = field(default=1.0, metadata={"help": "Temperature of the router."})
    use_gks: bool = field(default=False, metadata={"help": "Subtract general knowledge."})
    task_adapter_names: list[str] | None = field(default=None, init=False, metadata={"help": "The experts."})
    gks_adapter_names: list[str] | None = field(default=None, init=False, metadata={"help": "General knowledge."})
    rng_seed: int | None = field(default=None, metadata={"help": "Seed of the start."})

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ValueError(f"top_k={self.top_k} must be positive: a token uses at least one expert.")
        if self.router_temperature <= 0:
            raise ValueError(f"router_temperature={self.router_temperature} must be positive.")
