# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Batches whose rows use different adapters, on modules whose parameters are adapted: attention and stacked experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from peft import LoraConfig, get_peft_model

NAMES = ["plain", "__base__", "dora", "plain", "__base__", "dora"]
X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    """Attention over rows that stay rows, with its weights as a further result."""

    def __init__(self, batch_first: bool, **sizes: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes)

    def forward(self, x: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = [x, x[..., : self.attn.kdim], x[..., : self.attn.vdim]]
        if self.attn.batch_first:
            return self.attn(*inputs, **kwargs)
        y, weights = self.attn(*(part.transpose(0, 1) for part in inputs), **kwargs)
        return y.transpose(0, 1), weights


class Experts(nn.Module):
    """Stacked experts that see tokens without their rows, unless told otherwise."""

    def __init__(self, result: str = "flat") -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 12, 8) / 3), nn.Parameter(torch.randn(3, 8, 12) / 3)
        self.result = result

    def forward(self, x: torch.Tensor) -> object:
        hidden = torch.tanh(torch.einsum("ti,eoi->teo", x, self.up))
        y = torch.einsum("tei,eoi->to", hidden, self.down)
        return {"flat": y, "pair": (y, None), "mean": y.mean(), "listed": [y]}[self.result]


class Block(nn.Module):
    def __init__(self, result: str = "flat") -> None:
        super().__init__()
        self.experts, self.head = Experts(result), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.experts(x.flatten(0, 1))
        return self.head((y[0] if isinstance(y, tuple) else y).unflatten(0, x.shape[:2]))


def tuned(base: nn.Module, **options: object) -> nn.Module:
    """A model with the adapters `plain` and `dora`, of different ranks, all of whose factors are filled."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **options), "plain")
    model.add_adapter("dora", LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, use_dora=True, **options))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.1)
    return model.eval()


def one_by_one(model: nn.Module, name: str, *args: object, **kwargs: object) -> object:
    if name == "__base__":
        with model.disable_adapter():
            return model(*args, **kwargs)
    model.set_adapter(name)
    return model(*args, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention(batch_first, sizes, need_weights):
    model = tuned(Attention(batch_first, **sizes), target_modules=["attn"])
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[:, 4] = padding[2, 3] = True
    options = {"key_padding_mask": padding, "need_weights": need_weights}
    y, weights = model(X, adapter_names=NAMES, **options)
    for i, name in enumerate(NAMES):
        expected, expected_weights = one_by_one(model, name, X, **options)
        torch.testing.assert_close(y[i], expected[i])
        if need_weights:
            torch.testing.assert_close(weights[i], expected_weights[i])
    assert weights is not None or not need_weights
    assert not torch.allclose(y[0], one_by_one(model, "__base__", X, **options)[0][0])


def test_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = tuned(nn.Sequential(layer), target_modules=["self_attn", "linear1"])
    y = model(X, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], one_by_one(model, name, X)[i])


@pytest.mark.parametrize("result", ["flat", "pair"])
@pytest.mark.parametrize("parameters", [["experts.up"], ["experts.up", "experts.down"]])
def test_experts(parameters, result):
    model = tuned(Block(result), target_modules=["head"], target_parameters=parameters)
    y = model(X, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], one_by_one(model, name, X)[i])
    assert not torch.allclose(y[0], one_by_one(model, "__base__", X)[0])


def test_experts_run_once_an_adapter():
    model = tuned(Block(), target_modules=[], target_parameters=["experts.up", "experts.down"])
    runs = []
    model.base_model.model.experts.get_base_layer().register_forward_hook(lambda *_: runs.append(1))
    model(X, adapter_names=NAMES)
    assert len(runs) == 3


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=3, pad_token_id=0, **sizes)
    ).eval()


def test_experts_of_a_language_model():
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = tuned(mixtral(), **options)
    ids = torch.randint(1, 32, (6, 7), generator=torch.Generator().manual_seed(4))
    y = model(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], one_by_one(model, name, input_ids=ids).logits[i])
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    for i, name in enumerate(NAMES):
        alone = one_by_one(_Generating(model), name, input_ids=ids[i : i + 1], **settings)[0]
        assert mixed[i, : len(alone)].tolist() == alone.tolist()


class _Generating:
    """A model whose call is `generate`."""

    def __init__(self, model: nn.Module) -> None:
        self.disable_adapter, self.set_adapter, self._generate = (
            model.disable_adapter,
            model.set_adapter,
            model.generate,
        )

    def __call__(self, **kwargs: object) -> torch.Tensor:
        return self._generate(**kwargs)


@pytest.mark.parametrize("result", ["mean", "listed"])
def test_results_without_rows(result):
    model = tuned(nn.Sequential(Experts(result)), target_modules=[], target_parameters=["0.up"])
    with pytest.raises(ValueError, match="adapter_names has 6 entries, and Experts gives"):
        model(X[:, 0], adapter_names=NAMES)


def test_a_number_of_names_that_is_not_the_batch():
    model = tuned(Attention(False), target_modules=["attn"])
    with pytest.raises(ValueError, match="adapter_names has 5 entries for a batch of 6"):
        model(X, adapter_names=NAMES[:5])


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (lambda: Attention(True), {"target_modules": ["attn"]}),
        (Block, {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}),
    ],
    ids=["attention", "experts"],
)
def test_merged_adapters_are_refused(base, options):
    model = tuned(base(), **options)
    model.merge_adapter(["plain"])
    with pytest.raises(ValueError, match="adapter_names cannot be used while adapters are merged"):
        model(X, adapter_names=NAMES)
    model.unmerge_adapter()
    model(X, adapter_names=NAMES)
