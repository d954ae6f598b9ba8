# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Recipes for MonteCLoRA and Arrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from recipes import backward, evaluated, fill, recipe, saved_files, trainable
from torch import nn

import peft


# ---- MonteCLoRA ------------------------------------------------------------------------------------------------------
def _drawn() -> dict[str, torch.Tensor]:
    """What a sampler of rank 3, 4 samples and 8 features is given in place of random numbers."""
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(3, 3, generator=generator)
    return {
        "z_mvn": torch.randn(4, 8, 3, generator=generator),
        "z_wishart": root @ root.t(),
        "z_dirichlet": torch.randn(4, generator=generator),
    }


def _monteclora(**options: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    settings = peft.MontecloraConfig(num_samples=4, sample_scaler=0.5, kl_loss_weight=0.1, buffer_size=2, **options)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], monteclora_config=settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    fill(model)
    model.base_model.model[0].lora_monteclora_sampler["default"].sampler.get = _drawn
    return model, torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


@recipe
def monteclora_sampler() -> dict[str, Any]:
    """The sampler's functions of given numbers; without the divergence of the Dirichlet distribution."""
    from peft.tuners.lora.monteclora import MontecloraSampler

    sampler = MontecloraSampler(8, 3, 4, buffer_size=2, sample_scaler=0.7)
    drawn, alpha = _drawn(), torch.tensor([0.2, 0.5, 0.9, 1.4])
    std = torch.diag(torch.tensor([0.5, 0.8, 0.1]))
    variance = torch.diag(torch.tensor([2.0, 0.3, 1.1]))
    return {
        "wishart": sampler.wishart_reparameterization(std, drawn["z_wishart"]),
        "normal": sampler.multivariate_reparameterization(drawn["z_mvn"], drawn["z_wishart"]),
        "dirichlet": sampler.dirichlet_reparameterization(alpha, drawn["z_dirichlet"]),
        "small": sampler.dirichlet_reparameterization(torch.zeros(4), drawn["z_dirichlet"]),
        "wishart_kl": sampler.wishart_kl(std),
        "normal_kl": sampler.multivariate_kl(variance),
    }


@recipe
def dirichlet_divergence(prior: float) -> float:
    """The divergence of a Dirichlet distribution from a prior, which is not negative, and 0 from itself."""
    from peft.tuners.lora.monteclora import MontecloraSampler

    sampler = MontecloraSampler(8, 3, 4, buffer_size=2, dirichlet_prior=prior)
    other = sampler.dirichlet_kl(torch.tensor([0.2, 0.5, 0.9, 1.4])).item()
    return min(other, -abs(sampler.dirichlet_kl(torch.full((4,), prior)).item()))


@recipe
def monteclora(folder: str) -> dict[str, Any]:
    """Outputs in training and evaluation, gradients, the weight after a merge, and what is saved."""
    model, x = _monteclora(use_entropy=True)
    model.train()
    y = model(x)
    out: dict[str, Any] = {"y": y, "grads": backward(model, y, x), "start": sorted(trainable(model))}
    sampler = model.base_model.model[0].lora_monteclora_sampler["default"]
    out["entropy"] = sampler.get_variational_loss()[1]
    model.save_pretrained(folder)
    with evaluated(model):
        out["eval"] = model(x)
        model.merge_adapter()
        out["merged"] = model.base_model.model[0].base_layer.weight
    return {**out, "saved": saved_files(folder)}


@recipe
def monteclora_loaded(folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 6)), folder)
    _, x = _monteclora()
    with evaluated(model):
        return {"y": model(x), "state": peft.get_peft_model_state_dict(model)}


# ---- Arrow -----------------------------------------------------------------------------------------------------------
_IDS = torch.tensor([[5, 3, 9, 1], [7, 2, 4, 8]])


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes))


@recipe
def arrow_experts(folder: str, count: int = 5) -> None:
    """Write experts whose first singular value stands out, so that iterations find the vector that belongs to it."""
    for i in range(count):
        config = peft.LoraConfig(r=3, lora_alpha=2 * i + 1, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(_llama(), config)
        fill(model, str(i))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter[0] *= 6
        model.save_pretrained(Path(folder, str(i)))


@recipe
def arrow(folder: str, experts: str, use_gks: bool) -> dict[str, Any]:
    """Outputs of a routed model, with the settings and the files of its router."""
    paths = [str(Path(experts, str(i))) for i in range(5)]
    settings = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=use_gks, rng_seed=1)
    model = peft.create_arrow_model(_llama(), paths[:3], settings, paths[3:])
    with evaluated(model):
        y = model(input_ids=_IDS).logits
        model.set_adapter("task_0")
        first = model(input_ids=_IDS).logits
        model.set_adapter("arrow_router")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    out = {
        "y": y,
        "prototypes": layer.lora_arrow["arrow_router"].prototypes.abs(),
        "adapters": list(model.peft_config),
    }
    if not use_gks:
        out["first"] = first
    model.save_pretrained(folder, selected_adapters=["arrow_router"])
    return {**out, "saved": saved_files(folder)}
