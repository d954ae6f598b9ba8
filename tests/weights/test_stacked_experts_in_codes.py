# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Stacked experts in codes: MXFP4, as GPT-OSS is published, and float8. They are refused by name; a checkpoint of them that
is loaded dense, as the error says, is trained."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import FP4_VALUES, Mxfp4GptOssExperts

from peft import LoraConfig, PeftModel, get_peft_model
from peft.weights import find_weight

EXPERTS = ("gate_up_proj", "down_proj")


class Experts(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4).to(dtype), requires_grad=False)

    def forward(self, x):
        return x


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=["mxfp4", "float8"])
def test_stacked_experts_in_codes_are_refused_before_anything_changes(dtype):
    base = nn.Sequential(Experts(dtype))
    before = list(base.named_parameters())
    with pytest.raises(ValueError, match=r"gate_up_proj of Experts is quantised .*dequantize=True"):
        get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["0.gate_up_proj"]))
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in before]


class KernelTensor:
    """What the kernels' library makes of MXFP4 codes: no `torch.Tensor`, and reordered for the product."""

    dtype = "FP4"

    def __init__(self, codes):
        self.shape = torch.Size([*codes.shape[:-2], 2 * codes.shape[-1], codes.shape[-2]])


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
def test_the_experts_of_transformers_in_mxfp4_are_refused_by_name(loaded):
    """They are all that transformers keeps in MXFP4: no linear layer, and codes that no delta can be added to. Loading
    takes the parameters away and leaves the kernels' own tensors."""
    config = GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)
    base = nn.Sequential(Mxfp4GptOssExperts(config), nn.Linear(64, 64))
    if loaded:
        for name in EXPERTS:
            setattr(base[0], name, KernelTensor(base[0]._parameters.pop(name)))
    with pytest.raises(TypeError, match="Mxfp4GptOssExperts has no `weight`"):
        find_weight(base[0])
    for target in ("0.gate_up_proj", "down_proj"):
        with pytest.raises(ValueError, match=f"{target[-5:]} of Mxfp4GptOssExperts is quantised .*dequantize=True"):
            get_peft_model(base, LoraConfig(target_modules=["1"], target_parameters=[target]))
        base[1] = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="Mxfp4GptOssExperts"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a model of GPT-OSS whose experts are in MXFP4, and what they stand for by name."""
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_local_experts=2, num_hidden_layers=1, vocab_size=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    kept, dense = model.state_dict(), {}
    for name in [name for name in kept if name.endswith(EXPERTS)]:
        experts, features, out = kept.pop(name).shape
        blocks = torch.randint(256, (experts, out, features // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        dense[name] = (torch.tensor(FP4_VALUES)[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(2).mT
        kept |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, tmp_path / "model.safetensors")
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": {"quant_method": "mxfp4"}}))
    return tmp_path, dense


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_checkpoint_in_mxfp4_that_is_loaded_dense_trains_and_merges(checkpoint, use_dora, tmp_path):
    folder, dense = checkpoint

    def load():
        settings = Mxfp4Config(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)

    base = load()
    assert dense and all(torch.equal(base.state_dict()[name], matrix) for name, matrix in dense.items())
    config = LoraConfig(
        target_modules=["q_proj"], target_parameters=[f"experts.{name}" for name in EXPERTS], r=2, use_dora=use_dora
    )
    tuned = get_peft_model(base, config)
    ids = torch.arange(8)[None]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        losses.append(tuned(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    tuned.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = tuned(ids).logits
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(ids).logits, expected)
        torch.testing.assert_close(tuned.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)
