# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A tiny model of Llama's shape, the same in every process, and what a training run on it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 3
ROWS = 4  # sequences of a step, all ranks together


class Run(NamedTuple):
    """What a run leaves behind, whole and on the CPU.

    Args:
        losses: One a step, the mean over all ranks, and one more after the last step.
        gradients: One dict a step, by the parameter's name on one process.
        parameters: The trained ones at the end.
    """

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor]


def base_model(device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, **settings}
    config = LlamaConfig(tie_word_embeddings=False, use_cache=False, **shape)
    return LlamaForCausalLM(config).to(device, dtype)


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """The base with one adapter whose B is not zero, so that the norm is not that of W alone."""
    base = base_model() if base is None else base
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_dora": True, **options})
    model = get_peft_model(base, config)
    fill(model)
    return model


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    """The model in training mode, its blocks run once more in the backward pass."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model.train()


def fill(model: nn.Module) -> None:
    """Give every A and B values that depend on its name alone."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            with torch.no_grad():
                parameter.copy_(value.to(parameter))


def batches(vocabulary: int = 64, steps: int = STEPS, rows: int = ROWS) -> torch.Tensor:
    """Token ids [steps, rows, 8]."""
    return torch.randint(0, vocabulary, (steps, rows, 8), generator=torch.Generator().manual_seed(2))


def own_rows(batch: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return batch.chunk(world)[rank]


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    parts = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in parts)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, gathered where it is sharded."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.float().cpu().clone()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.grad) for name, parameter in trained(model)}


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter) for name, parameter in trained(model)}


def train(
    model: nn.Module,
    *,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    gradients: Callable[[nn.Module], dict[str, torch.Tensor]] = gradients_of,
    parameters: Callable[[nn.Module], dict[str, torch.Tensor]] = parameters_of,
) -> Run:
    """Train on this rank's rows of every batch by plain gradient descent.

    Args:
        model: The model, or what wraps it.
        rank, world: This rank, and how many share a batch.
        accumulate: Passes over the batch before each step.
        gradients, parameters: Read what is trained, whole and by its name on one process.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD([parameter for _, parameter in trained(model)], lr=0.1)
    losses, steps = [], []
    for batch in batches():
        ids = own_rows(batch, rank, world).to(device)
        for _ in range(accumulate):
            loss = model(input_ids=ids, labels=ids).loss
            (loss / accumulate).backward()
        losses.append(mean_over_ranks(loss, world))
        steps.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids = own_rows(batches()[0], rank, world).to(device)
        losses.append(mean_over_ranks(model(input_ids=ids, labels=ids).loss, world))
    return Run(losses, steps, parameters(model))


def mean_over_ranks(loss: torch.Tensor, world: int) -> float:
    total = loss.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(total)
    return total.item() / world


def compare(run: Run, truth: Run, rtol: float = 1e-5) -> None:
    """Losses and parameters within `rtol`, gradients within ten times that, of the largest entry of each."""
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(truth.losses), rtol=rtol, atol=0)
    for step, (ours, theirs) in enumerate(zip(run.gradients, truth.gradients, strict=True)):
        for name, error in errors(ours, theirs).items():
            assert error <= 10 * rtol, f"the gradient of {name} in step {step} is off by {error:.1e}"
    for name, error in errors(run.parameters, truth.parameters).items():
        assert error <= rtol, f"{name} is off by {error:.1e}"


def errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference in each tensor, relative to its largest entry."""
    assert ours.keys() == theirs.keys()
    return {name: ((ours[name] - value).abs().max() / value.abs().max()).item() for name, value in theirs.items()}


def worst(run: Run, truth: Run) -> float:
    """The largest error of the first step's gradients."""
    return max(errors(run.gradients[0], truth.gradients[0]).values())
