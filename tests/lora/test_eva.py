# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""EVA: directions of the inputs, how ranks are handed out, and what the adapter and its config become."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import (
    HashHook,
    find_equal_values,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)


class Net(nn.Module):
    """Two layers that see the same input, and one that sees another; the input has clear directions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(50, 16)
        self.q = nn.Linear(16, 8)
        self.v = nn.Linear(16, 8)
        self.out = nn.Linear(8, 12)
        self.register_buffer("focus", torch.tensor([1.0] + [0.01] * 7))
        strengths = torch.tensor([8.0, 5.0, 3.0, 2.0, 1.0] + [0.05] * 11)
        self.emb.weight.data.mul_(strengths)

    def forward(self, input_ids, **kwargs):
        x = self.emb(input_ids)
        return self.out(torch.tanh(self.q(x) + self.v(x)) * self.focus)


def config(r=3, **settings):
    options = {"rho": 1.0, "tau": 0.95, **settings}
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=["q", "v", "out"],
        init_lora_weights="eva",
        eva_config=EvaConfig(**options),
    )


def loader():
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (24, 12))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)


def rows(net):
    return torch.cat([net.emb(batch["input_ids"]).flatten(0, 1) for batch in loader()]).detach()


def directions(x, k):
    return torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:k]


def test_a_becomes_the_principal_directions_of_the_input():
    net = Net()
    model = get_peft_model(net, config())
    ids = torch.arange(10).reshape(2, 5)
    before = model(ids).detach()
    initialize_lora_eva_weights(model, loader(), show_progress_bar=False)
    expected = directions(rows(Net()), 3)
    for layer in (model.base_model.model.q, model.base_model.model.v):
        a, b = layer.factors("default")
        torch.testing.assert_close((a @ expected.t()).abs(), torch.eye(3), atol=0.05, rtol=0)
        assert not b.any()
        assert layer.lora_A["default"].weight.requires_grad
    torch.testing.assert_close(model(ids), before)


def test_a_plain_model_gives_the_same_directions():
    plain = get_eva_state_dict(Net(), loader(), peft_config=config(), show_progress_bar=False)
    adapted = get_eva_state_dict(get_peft_model(Net(), config()), loader(), show_progress_bar=False)
    assert sorted(plain) == ["out", "q", "v"]
    for name, tensor in plain.items():
        torch.testing.assert_close(adapted[f"base_model.model.{name}"], tensor)


def test_ranks_follow_the_explained_variance_and_the_adapter_can_be_saved(tmp_path):
    model = get_peft_model(Net(), config(rho=2.0))
    initialize_lora_eva_weights(model, loader(), show_progress_bar=False)
    layers = {name: getattr(model.base_model.model, name) for name in ("q", "v", "out")}
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert sum(ranks.values()) == 9
    assert ranks["out"] < 3 < ranks["q"]
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.shape[0] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(ids), model.eval()(ids))


def test_scaling_is_kept_at_alpha_over_the_new_rank_where_asked():
    model = get_peft_model(Net(), config(rho=2.0, adjust_scaling_factors=False))
    initialize_lora_eva_weights(model, loader(), show_progress_bar=False)
    layer = model.base_model.model.q
    assert layer.scaling["default"] == pytest.approx(6 / layer.r["default"])


def test_layers_of_rank_zero_lose_the_adapter():
    model = get_peft_model(Net(), config())
    state = {f"base_model.model.{name}": torch.eye(16)[:3] for name in ("q", "v")}
    state["base_model.model.out"] = torch.zeros(0, 8)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    assert type(model.base_model.model.out) is nn.Linear
    assert sorted(model.peft_config["default"].target_modules) == ["q", "v"]


def test_whitening_divides_by_the_root_of_the_singular_values():
    plain = get_eva_state_dict(Net(), loader(), peft_config=config(), show_progress_bar=False)
    white = get_eva_state_dict(Net(), loader(), peft_config=config(whiten=True), show_progress_bar=False)
    x = rows(Net())
    values = torch.linalg.svdvals(x - x.mean(0))[:3]
    for name in ("q", "v"):
        ratio = white[name].norm(dim=1) / plain[name].norm(dim=1)
        assert (ratio[1:] > ratio[:-1]).all()
        torch.testing.assert_close(ratio / ratio[0], (values[0] / values).sqrt().to(ratio), rtol=0.1, atol=0)


def test_tokens_without_label_or_attention_are_left_out():
    batch = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 1, 1, 1], [-100, -100, 1, 1]]),
    }
    index = prepare_model_inputs_fn_language_modeling(batch, config())
    assert index.tolist() == [[0, 1], [0, 2], [1, 2], [1, 3]]
    every = prepare_model_inputs_fn_language_modeling(batch, config(use_label_mask=False))
    assert len(every) == 7
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(prepare_layer_inputs_fn_language_modeling((x,), index, "q")[1], x[0, 2])


def test_equal_inputs_are_found_by_their_hashes():
    assert find_equal_values({"a": (1,), "b": (1,), "c": (2,)}) == {(1,): ["a", "b"]}
    assert HashHook.hash_fn(torch.ones(3)) == HashHook.hash_fn(torch.ones(3))
    assert HashHook.hash_fn(torch.ones(3)) != HashHook.hash_fn(torch.zeros(3))


def test_what_is_missing_is_said():
    plain = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match="not 'eva'"):
        initialize_lora_eva_weights(plain, loader())
    model = get_peft_model(Net(), config())
    with pytest.raises(ValueError, match="dataloader"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="no entry for"):
        initialize_lora_eva_weights(model, eva_state_dict={})
    with pytest.raises(ValueError, match="no adapter 'other'"):
        initialize_lora_eva_weights(model, eva_state_dict={}, adapter_name="other")
    with pytest.raises(ValueError, match="empty"):
        get_eva_state_dict(model, [])
