# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Hotswaps on layers that count ranks in their own way: convolutions, in groups too, and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))),
    "groups": (
        lambda: nn.Conv2d(4, 8, 3, groups=2),
        torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),
    ),
    "embedding": (lambda: nn.Embedding(7, 6), torch.tensor([[0, 3, 6]])),
}


def adapted(layer: str, r: int, seed: int = 1, **settings) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[layer][0]())
    torch.manual_seed(seed)
    config = LoraConfig(r=r, target_modules=["0"], init_lora_weights=False, **settings)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("old", "new", "room"), [(4, 4, None), (4, 2, None), (2, 4, None), (2, 4, 8), (4, 2, 8)])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_output_is_the_new_adapters(tmp_path: Path, layer, old, new, room, dora):
    x = LAYERS[layer][1]
    model, other = adapted(layer, old, use_dora=dora), adapted(layer, new, 2, use_dora=dora, lora_alpha=3)
    other.save_pretrained(tmp_path / "other")
    if room is not None:
        before = model(x)
        prepare_model_for_compiled_hotswap(model, target_rank=room)
        torch.testing.assert_close(model(x), before)
    hotswap_adapter(model, tmp_path / "other", "default", torch_device="cpu")
    torch.testing.assert_close(model(x), other(x))
    saved, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert all(torch.equal(saved[key], value) for key, value in expected.items())
    doubled = {key: value * 2 for key, value in saved.items()}
    set_peft_model_state_dict(model, doubled)  # back into the room
    assert all(torch.equal(value, doubled[key]) for key, value in get_peft_model_state_dict(model).items())


def test_ranks_that_do_not_fall_into_groups_are_refused_before_anything_changes():
    model = adapted("groups", 2)
    before = model.state_dict()
    with pytest.raises(ValueError, match="target_rank=5.*2 groups"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    state = get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="rank 3.*groups=2"):
        hotswap_adapter_from_state_dict(model, state, "default", LoraConfig(r=3, target_modules=["0"]))
    assert all(value.shape == before[key].shape for key, value in model.state_dict().items())
