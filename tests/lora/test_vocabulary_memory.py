# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA on embeddings, heads and convolutions: no dense B A, and nothing as large as the weight beyond one chunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft import LoraConfig, get_peft_model
from peft.dora.norm import CHUNK_BYTES

VOCABULARY, WIDTH, RANK = 128_256, 512, 4
MIB = 2**20


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operator makes which none of its inputs has."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


class Tokens(nn.Module):
    """An embedding and a head over one vocabulary, with one table or two."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def largest_in_a_step(model: nn.Module, x: torch.Tensor, inference: bool) -> int:
    model(x)  # what is kept from pass to pass is made
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data.mul_(1.01)
    with Largest() as seen, torch.set_grad_enabled(not inference):
        y = model(x)
        if not inference:
            y.sum().backward()
    return seen.bytes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]], ids="+".join)
def test_vocabularies(tied, inference, targets):
    """The weight has 250 MiB. A's and B's gradients, and the logits of 8 tokens, have 2 and 4."""
    model = get_peft_model(
        Tokens(tied), LoraConfig(r=RANK, use_dora=True, target_modules=targets, init_lora_weights=False)
    )
    weight = VOCABULARY * WIDTH * 4
    largest = largest_in_a_step(model, torch.arange(8).view(1, 8), inference)
    assert weight > 3 * CHUNK_BYTES
    assert 0 < largest <= CHUNK_BYTES + MIB


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(2048, 4096, 5), (1, 2048, 5)), (nn.Conv2d(1024, 2048, 5), (1, 1024, 5, 5))],
    ids=["conv1d", "conv2d"],
)
def test_convolutions(layer, shape, inference):
    """The weights have 160 and 200 MiB; the convolution itself may copy its weight, the norm and the branch do not."""
    base = nn.Sequential(layer).requires_grad_(False)
    x = torch.randn(shape)
    model = get_peft_model(base, LoraConfig(r=RANK, use_dora=True, target_modules=["0"], init_lora_weights=False))
    assert layer.weight.nbytes > 2 * CHUNK_BYTES
    assert largest_in_a_step(model, x, inference) <= CHUNK_BYTES + MIB
