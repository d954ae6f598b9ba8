# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A stays as it was drawn, only B is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft.utils.warning import PeftWarning


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradient of B is the one that changes the weight most like the full gradient would.

    With A frozen, a step dB changes the weight by s·dB·A. The change nearest to the full gradient G, in the
    least-squares sense, has dB = (1/s²)·g_B·(A Aᵀ)⁻¹ with g_B = s·G·Aᵀ, the gradient of B that backpropagation gives.

    Args:
        params: Parameters or groups of them. A group may have `scaling_factors`, one entry a parameter: a number s
            marks a B, whose A is the parameter before it; None marks a parameter that is trained as it is.
        lr: Learning rate.
        betas: Decay of the running means of gradients and of their squares.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        correct_bias: Correct the running means for their start at zero.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 1e-3, betas: tuple[float, float]
        = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0, correct_bias: bool = True,
    ) -> None:  # fmt: skip
        if lr < 0:
            raise ValueError(f"lr={lr} must not be negative.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must both lie in [0, 1).")
        if eps < 0:
            raise ValueError(f"eps={eps} must not be negative.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "scaling_factors": None,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scalings = group["scaling_factors"] or [None] * len(group["params"])
            before = None
            for parameter, scaling in zip(group["params"], scalings, strict=True):
                if parameter.grad is not None:
                    gradient = parameter.grad
                    if scaling is not None:
                        gradient = _nearest_gradient(gradient, before, scaling)
                    self._adam(parameter, gradient, group)
                before = parameter
        return loss

    def _adam(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = group["lr"]
        if group["correct_bias"]:
            rate *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate)
        if group["weight_decay"] > 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _nearest_gradient(gradient: torch.Tensor, lora_a: torch.Tensor, scaling: float) -> torch.Tensor:
    """(1/s²)·g_B·(A Aᵀ)⁻¹ for g_B `[out, r, ...]` and A `[r, in, ...]`, in the gradient's shape and dtype."""
    a = lora_a.flatten(1).float()
    gram = a @ a.T  # [r, r]
    gram.diagonal().add_(1e-8)  # an A of less than full rank has no inverse
    solved = torch.linalg.solve_ex(gram, gradient.flatten(1).float().T).result.T
    return (solved / scaling**2).reshape(gradient.shape).to(gradient.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None,
) -> Optimizer:  # fmt: skip
    """Freeze every A of a model and return an optimizer for the rest.

    LoRA of embeddings, whose A starts at zero, is trained as it is.

    Args:
        model: Model with LoRA adapters; their A is frozen in place.
        r: Rank. The ranks and scalings of the model's layers are what is used; a warning says if this one differs.
        lora_alpha: As `r`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        use_rslora: Not needed; refused if it contradicts the adapters' config.

    Raises:
        ValueError: `use_rslora` contradicts the config of an active adapter, or the model has no trainable LoRA layer.
    """
    _check_against_configs(model, r, lora_alpha, use_rslora)
    params: list[nn.Parameter] = []
    scalings: list[float | None] = []
    names: list[str] = []
    paired: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for adapter, lora_a, lora_b in trainable_pairs(module):
            lora_a.requires_grad_(False)
            params += [lora_a, lora_b]
            scalings += [None, module.scaling[adapter]]
            names += [f"{name}.lora_A.{adapter}.weight", f"{name}.lora_B.{adapter}.weight"]
            paired.update((lora_a, lora_b))
    if not params:
        raise ValueError("The model has no trainable lora_A and lora_B: add a LoRA adapter that is not frozen first.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in paired:
            params.append(parameter)
            scalings.append(None)
            names.append(name)
    group = {"params": params, "names": names, "scaling_factors": scalings}
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)


def trainable_pairs(module: nn.Module) -> Iterable[tuple[str, nn.Parameter, nn.Parameter]]:
    """The adapters of a module with a trainable B: their names, the weights of A and of B."""
    lora_a, lora_b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if isinstance(lora_a, nn.ModuleDict) and isinstance(lora_b, nn.ModuleDict):
        for name, b in lora_b.items():
            if name in lora_a and hasattr(b, "weight") and b.weight.requires_grad:
                yield name, lora_a[name].weight, b.weight


def _check_against_configs(model: nn.Module, r: int, lora_alpha: int, use_rslora: bool | None) -> None:
    configs = getattr(model, "peft_config", {})
    for name in getattr(model, "active_adapters", None) or []:
        config = configs.get(name)
        if config is None:
            continue
        if use_rslora is not None and use_rslora != config.use_rslora:
            raise ValueError(
                f"use_rslora={use_rslora} contradicts the config of the adapter {name!r}: set it in LoraConfig and "
                "leave it out here."
            )
        if (r, lora_alpha) != (config.r, config.lora_alpha):
            warnings.warn(
                f"r={r} and lora_alpha={lora_alpha} are not those of the adapter {name!r} (r={config.r}, lora_alpha="
                f"{config.lora_alpha}); the adapter's own are used.",
                PeftWarning,
                stacklevel=3,
            )
