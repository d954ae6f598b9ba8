# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Arrow (Ostapenko et al., arXiv 2405.11157) on linear layers: each token chooses among the layer's LoRA experts.

An expert's prototype is the first right singular vector of B A; a token x weighs the `top_k` experts with the largest
|x · prototype| by a softmax. With GenKnowSub (arXiv 2506.02177) the mean of the general adapters' factors is taken out
of the experts' first. No adapter is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layer.variant import LoraVariant

if TYPE_CHECKING:
    from ..config import ArrowConfig
    from ..layer.base import LoraLayer

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
ROUTER = "arrow_router"


class ArrowLoraLinearLayer(nn.Module):
    """The router of one layer. It has no parameters: prototypes follow from the experts' factors.

    Args:
        in_features: Input features of the layer.
        arrow_config: The router's settings.
    """

    def __init__(self, in_features: int, arrow_config: ArrowConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.top_k = arrow_config.top_k
        self.temperature = arrow_config.router_temperature
        self.rng_seed = arrow_config.rng_seed
        self.use_gks = arrow_config.use_gks
        self.task_adapter_names = list(arrow_config.task_adapter_names or ())
        self.gks_adapter_names = list(arrow_config.gks_adapter_names or ())
        self.router_names: tuple[str, ...] = (ROUTER,)  # adapters that are no experts
        self.prototypes: torch.Tensor | None = None  # [experts, in]
        self._stamp: tuple | None = None  # of the factors that the prototypes were made of

    def on_adapter_change(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict) -> None:
        """Let experts that came join, and forget those that went.

        Every adapter of the layer is one but routers and those with general knowledge.
        """
        others = (*self.gks_adapter_names, *self.router_names)
        known = [name for name in self.task_adapter_names if name in lora_A]
        new = [name for name in lora_A if name not in (*known, *others) and not name.startswith(GKS_ADAPTER_PREFIX)]
        self.task_adapter_names = known + new

    @torch.no_grad()
    def top_right_singular_vec_from_BA(
        self, A: torch.Tensor, B: torch.Tensor, iters: int = 15, eps: float = 1e-8
    ) -> torch.Tensor:
        """The first right singular vector of B A `[in]`, in float32, its sign left open.

        It is found exactly, from the small matrix that is left of B A between two orthonormal bases.

        Args:
            A: `[r, in]`.
            B: `[out, r]`.
            iters, eps: Taken for compatibility.
        """
        basis, rest = torch.linalg.qr(A.float().t())  # A = restᵀ basisᵀ
        _, root = torch.linalg.qr(B.float())
        return basis @ torch.linalg.svd(root @ rest.t()).Vh[0]

    @torch.no_grad()
    def gen_know_sub(
        self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each expert, with `use_gks` less the mean A and B of the adapters with general knowledge.

        Raises:
            ValueError: There are no experts, no adapters with general knowledge, or their ranks differ.
        """
        experts = {name: (lora_A[name].weight, lora_B[name].weight) for name in self.task_adapter_names}
        if not experts:
            raise ValueError("An Arrow router needs experts: load adapters beside it (create_arrow_model does).")
        if not self.use_gks:
            return experts
        general = [(lora_A[name].weight, lora_B[name].weight) for name in self.gks_adapter_names]
        shapes = {(a.shape, b.shape) for a, b in (*experts.values(), *general)}
        if not general or len(shapes) > 1:
            raise ValueError(
                "use_gks=True needs general adapters of the experts' rank (gks_adapter_names="
                f"{self.gks_adapter_names}): pass general_adapter_paths to create_arrow_model, or switch it off."
            )
        mean_a, mean_b = (torch.stack(factors).mean(0) for factors in zip(*general, strict=True))
        return {name: (a - mean_a, b - mean_b) for name, (a, b) in experts.items()}

    @torch.no_grad()
    def build_prototypes(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict) -> None:
        """Set `prototypes` `[experts, in]` to the experts' first right singular vectors."""
        experts = self.gen_know_sub(lora_A, lora_B)
        self.prototypes = torch.stack([self.top_right_singular_vec_from_BA(a, b) for a, b in experts.values()])

    def _refresh(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The experts' factors, with prototypes that belong to them."""
        self.on_adapter_change(lora_A, lora_B)
        names = (*self.task_adapter_names, *(self.gks_adapter_names if self.use_gks else ()))
        weights = [holder[name].weight for name in names for holder in (lora_A, lora_B)]
        if torch.compiler.is_compiling():
            self.build_prototypes(lora_A, lora_B)
            return self.gen_know_sub(lora_A, lora_B)
        stamp = (self.use_gks, names, *((id(w), w._version, w.data_ptr(), w.device) for w in weights))
        if stamp != self._stamp or self.prototypes is None:
            self.build_prototypes(lora_A, lora_B)
            self._stamp = stamp
        return self.gen_know_sub(lora_A, lora_B)

    def forward(
        self,
        x: torch.Tensor,
        lora_A: nn.ModuleDict,
        lora_B: nn.ModuleDict,
        dropout: nn.Module,
        scaling: dict[str, float],
    ) -> torch.Tensor:
        """Σₖ wₖ sₖ Bₖ Aₖ d(x) over each token's experts, `[..., out]`.

        Args:
            x: `[..., in]`.
            lora_A, lora_B: The layer's factors by adapter.
            dropout: d.
            scaling: s by adapter.

        Raises:
            ValueError: There are no experts, or fewer than `top_k`.
        """
        experts = self._refresh(lora_A, lora_B)
        if len(experts) < self.top_k:
            raise ValueError(f"arrow_config: top_k={self.top_k}, but there are {len(experts)} experts: lower it.")
        scores = (x @ self.prototypes.to(x).t()).abs() / self.temperature
        best, chosen = scores.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        weights = weights * torch.tensor([scaling[name] for name in experts], dtype=x.dtype, device=x.device)
        ranks = torch.tensor([len(a) for a, _ in experts.values()], device=x.device)
        all_a = torch.cat([a for a, _ in experts.values()]).to(x)  # [Σ r, in]
        all_b = torch.cat([b for _, b in experts.values()], dim=1).to(x)  # [out, Σ r]
        hidden = dropout(x) @ all_a.t() * weights.repeat_interleave(ranks, dim=-1, output_size=len(all_a))
        return hidden @ all_b.t()


class ArrowLinearVariant(LoraVariant):
    """An adapter that is a router: its own A and B are not used."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Create the router of this layer in `lora_arrow`."""
        router = ArrowLoraLinearLayer(module.in_features, config.arrow_config)
        module.add_setting("lora_arrow", adapter_name, router, nn.ModuleDict())

    def why_not_foldable(self, layer: LoraLayer, name: str) -> str | None:
        return "it is an Arrow router, which weighs its experts token by token: merge an expert, or delete the router."

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{active_adapter!r} is an Arrow router: it cannot be merged.")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        raise RuntimeError(f"{active_adapter!r} is an Arrow router: it cannot be merged.")

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{active_adapter!r} is an Arrow router: it is never merged.")

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        x = module._cast_input_dtype(x, module.lora_A[active_adapter].weight.dtype)
        dropout = module.lora_dropout[active_adapter]
        router = module.lora_arrow[active_adapter]
        router.router_names = tuple(module.lora_arrow)
        return result + router(x, module.lora_A, module.lora_B, dropout, module.scaling)
