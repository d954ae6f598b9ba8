# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Variants of LoRA: the output that each defines, its gradient where that differs, merging, and what excludes what."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.variants import (
    BlockDiagonalLinear,
    QALoraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
)
from peft.tuners.lora.velora import VeloraFunction

BD_A = {"use_bdlora": BdLoraConfig(target_modules_bd_a=["body"], nblocks=2)}
BD_B = {"use_bdlora": BdLoraConfig(target_modules_bd_b=["body"], nblocks=2)}
MERGEABLE = {
    "kasa": {"kasa_config": KasaConfig()},
    "block-diagonal A": BD_A,
    "block-diagonal B": BD_B,
    "velora": {"velora_config": VeloraConfig(num_groups=2)},
    "mica": {"init_lora_weights": "mica"},
}


class Host(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def linear(transposed=False):
    torch.manual_seed(0)
    return Conv1D(16, 8) if transposed else nn.Linear(8, 16)


def adapted(body=None, **settings):
    """A model with one adapter whose parameters are random, and its layer."""
    body = linear() if body is None else body
    settings = {"r": 2, "lora_alpha": 8, "fan_in_fan_out": isinstance(body, Conv1D), **settings}
    model = get_peft_model(Host(body), LoraConfig(target_modules=["body"], **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model, model.base_model.model.body


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", list(MERGEABLE))
def test_output_is_base_plus_delta_and_merging_keeps_it(name, transposed):
    model, layer = adapted(linear(transposed), **MERGEABLE[name])
    model.eval()
    x = torch.randn(3, 5, 8)
    y = model(x)
    delta = layer.get_delta_weight("default")
    update = x @ (delta if transposed else delta.t())
    torch.testing.assert_close(y, layer.base_layer(x) + update, rtol=1e-4, atol=1e-4)
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(MERGEABLE))
def test_a_saved_variant_gives_the_same_output_when_loaded(tmp_path, name):
    model, _ = adapted(**MERGEABLE[name])
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Host(linear()), tmp_path).eval()
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-4)


# ---- KaSA ----------------------------------------------------------------------------------------------------------
def test_kasa_takes_the_smallest_singular_values_out_of_the_base_weight():
    body = linear()
    before = torch.linalg.svdvals(body.weight.detach())
    _, layer = adapted(body, kasa_config=KasaConfig())
    after = torch.linalg.svdvals(layer.base_layer.weight)
    torch.testing.assert_close(after[:6], before[:6])
    assert after[6:].max() < 1e-5
    assert layer.lora_diag["default"].shape == (2,)


def test_kasa_loss_is_the_sum_over_layers():
    model, layer = adapted(kasa_config=KasaConfig(beta=0.1, gamma=0.2))
    a, b = layer.factors("default")
    one = torch.eye(2)
    apart = torch.linalg.norm(a @ a.t() - one) + torch.linalg.norm(b.t() @ b - one)
    expected = 0.1 * layer.lora_diag["default"].square().sum() + 0.2 * apart
    torch.testing.assert_close(model.base_model._get_kasa_loss(), expected)
    assert adapted()[0].base_model._get_kasa_loss() == 0.0


def test_kasa_needs_a_rank_below_the_weights():
    with pytest.raises(ValueError, match="r=8"):
        adapted(r=8, kasa_config=KasaConfig())


# ---- block-diagonal LoRA -------------------------------------------------------------------------------------------
def test_a_block_diagonal_map_is_its_matrix():
    torch.manual_seed(0)
    blocks = BlockDiagonalLinear(8, 6, 2)
    x = torch.randn(3, 5, 8)
    matrix = blocks.weight_as_blockdiagonal_matrix()
    assert not matrix[:3, 4:].any() and not matrix[3:, :4].any()
    torch.testing.assert_close(blocks(x), x @ matrix.t())


def test_block_diagonal_factors_have_the_smaller_shapes():
    assert adapted(**BD_A)[1].lora_A["default"].weight.shape == (2, 4)
    assert adapted(**BD_B)[1].lora_B["default"].weight.shape == (16, 1)


def test_a_layer_that_no_list_names_is_plain_only_if_allowed():
    config = BdLoraConfig(target_modules_bd_a=["other"], nblocks=2)
    with pytest.raises(ValueError, match="neither"):
        adapted(use_bdlora=config)
    loose = BdLoraConfig(target_modules_bd_a=["other"], nblocks=2, match_strict=False)
    assert type(adapted(use_bdlora=loose)[1].lora_A["default"]) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**BD_A, "r": 3}, "nblocks=2"),
        ({**BD_A, "init_lora_weights": "pissa"}, "pissa"),
        ({**BD_B, "lora_bias": True}, "lora_bias"),
    ],
)
def test_what_has_no_block_diagonal_form_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(**settings)


# ---- VeLoRA --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [2, 3, 8, 64])
def test_velora_rebuilds_the_input_from_its_groups_for_the_weight_gradient(groups):
    torch.manual_seed(0)
    width = -(-8 // groups)
    embed = torch.randn(width)
    embed /= embed.norm()
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    dy = torch.randn(2, 5, 4)
    y = VeloraFunction.apply(x, weight, None, embed, groups, 1.5)
    y.backward(dy)
    padded = nn.functional.pad(x.detach().reshape(10, 8), (0, -8 % width)).unflatten(1, (-1, width))
    rebuilt = ((padded @ embed).unsqueeze(-1) * embed * 1.5).flatten(1)[:, :8]
    torch.testing.assert_close(y, x @ weight.t())
    torch.testing.assert_close(x.grad, dy @ weight)
    torch.testing.assert_close(weight.grad, dy.reshape(10, 4).t() @ rebuilt)


@pytest.mark.parametrize(
    ("init_type", "follows"), [("batch_average", True), ("batch_average_once", False), ("random", False)]
)
def test_velora_directions_have_norm_one_and_follow_batches_as_asked(init_type, follows):
    model, layer = adapted(velora_config=VeloraConfig(num_groups=2, init_type=init_type))
    model(torch.randn(3, 8))
    first = layer.lora_velora_embed["default"].clone()
    assert first.norm().item() == pytest.approx(1.0, abs=1e-5)
    model(torch.randn(3, 8))
    assert torch.equal(layer.lora_velora_embed["default"], first) is not follows
    state = get_peft_model_state_dict(model)
    assert state["base_model.model.body.lora_velora_embed"].shape == (4,)


# ---- aLoRA ---------------------------------------------------------------------------------------------------------
IDS = torch.tensor([[1, 3, 4, 5, 6], [1, 2, 5, 6, 7], [3, 4, 3, 4, 9], [1, 1, 1, 3, 4]])
OFFSETS = [4, None, 3, 2]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def alora_llama(**settings):
    settings = {"alora_invocation_tokens": [3, 4], **settings}
    config = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    return get_peft_model(llama(), config).eval()


def test_offsets_count_from_the_last_invocation():
    model = alora_llama()
    assert calculate_alora_offsets(model.peft_config, "default", IDS) == OFFSETS
    names = ["default", "__base__", "default", "__base__"]
    assert calculate_alora_offsets(model.peft_config, "default", IDS, names) == [4, None, 3, None]
    assert get_alora_offsets_for_forward(model, IDS) == {"alora_offsets": OFFSETS}
    assert get_alora_offsets_for_generate(model, inputs=IDS)["alora_offsets"] == OFFSETS
    assert get_alora_offsets_for_forward(alora_llama(alora_invocation_tokens=None), IDS) == {}
    with pytest.warns(UserWarning, match="inputs_embeds"):
        get_alora_offsets_for_forward(model, None, torch.zeros(1, 2, 16))


def test_tokens_before_the_invocation_are_the_base_models():
    with torch.no_grad():
        adapted_logits, base_logits = alora_llama()(input_ids=IDS).logits, llama()(input_ids=IDS).logits
    same = (adapted_logits - base_logits).abs().amax(-1) < 1e-5
    expected = [[position < 5 - (offset or 0) for position in range(5)] for offset in OFFSETS]
    assert same.tolist() == expected


def test_an_invoked_row_is_plain_lora_from_there_on():
    _, layer = adapted(alora_invocation_tokens=[1])
    x = torch.randn(2, 6, 8)
    y, base = layer(x, alora_offsets=[2, 0]), layer.base_layer(x)
    update = x @ layer.get_delta_weight("default").t()
    torch.testing.assert_close(y[0, 4:], (base + update)[0, 4:])
    torch.testing.assert_close(y[0, :4], base[0, :4])
    torch.testing.assert_close(y[1], base[1])
    torch.testing.assert_close(layer(x), base)


def test_rows_of_a_mixed_batch_have_their_own_offsets():
    model = alora_llama()
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter("plain", config)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "plain", "__base__", "default"]).logits
        active = model(input_ids=IDS).logits
        model.set_adapter("plain")
        plain = model(input_ids=IDS).logits
    torch.testing.assert_close(mixed[[0, 3]], active[[0, 3]])
    torch.testing.assert_close(mixed[1], plain[1])
    torch.testing.assert_close(mixed[2], llama()(input_ids=IDS).logits[2])


def test_generation_uses_the_prompts_offsets():
    out = alora_llama().generate(input_ids=IDS[:2], max_new_tokens=3, do_sample=False)
    base = llama().generate(input_ids=IDS[:2], max_new_tokens=3, do_sample=False)
    assert out.shape == base.shape
    assert torch.equal(out[1], base[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_are_the_same(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = alora_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_alora_is_not_merged():
    with pytest.raises(NotImplementedError, match="aLoRA"):
        alora_llama().merge_adapter()


# ---- QA-LoRA -------------------------------------------------------------------------------------------------------
def test_qalora_adds_the_delta_of_repeated_columns():
    _, layer = adapted()
    config = LoraConfig(r=2, use_qalora=True, qalora_group_size=4)
    QALoraLinearVariant.init(layer, "default", config)
    x = torch.randn(3, 8)
    y = QALoraLinearVariant.forward(layer, "default", x, layer.base_layer(x))
    delta = QALoraLinearVariant.get_delta_weight(layer, "default")
    assert layer.lora_A["default"].weight.shape == (2, 2)
    torch.testing.assert_close(y, layer.base_layer(x) + x @ delta.t(), rtol=1e-4, atol=1e-4)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    means = x.unflatten(-1, (2, 4)).mean(-1)
    torch.testing.assert_close(y, layer.base_layer(x) + layer.scaling["default"] * 2 * (means @ a.t() @ b.t()))
    with pytest.raises(ValueError, match="qalora_group_size=3"):
        QALoraLinearVariant.init(layer, "default", LoraConfig(r=2, use_qalora=True, qalora_group_size=3))


# ---- exclusion, replication ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings", [{"kasa_config": KasaConfig()}, BD_A, {"velora_config": VeloraConfig()}, {"init_lora_weights": "mica"}]
)
def test_dora_is_no_other_variant(settings):
    with pytest.raises(ValueError, match="all of these"):
        adapted(use_dora=True, **settings)


@pytest.mark.parametrize("body", [nn.Embedding(8, 4), nn.Conv2d(4, 4, 3)])
def test_variants_of_linear_layers_are_refused_elsewhere(body):
    with pytest.raises(ValueError, match="kasa_config"):
        adapted(body, kasa_config=KasaConfig())


def test_replicated_layers_share_weights_and_have_their_own_adapters():
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    layers = model.base_model.model.model.layers
    assert len(layers) == 3
    q = [layer.self_attn.q_proj for layer in layers]
    assert q[1].base_layer.weight is q[2].base_layer.weight
    assert q[1].lora_A["default"].weight is not q[2].lora_A["default"].weight
    assert model(input_ids=IDS).logits.shape == (4, 5, 32)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_the_output_may_be_written_over(use_dora, shape):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"], use_dora=use_dora))
    x = torch.randn(shape)
    y = model(x)
    expected = torch.autograd.grad(torch.relu(y + 1).sum(), model.base_model.model[0].lora_B["default"].weight)
    found = torch.autograd.grad(
        torch.relu_(model(x).add_(1)).sum(), model.base_model.model[0].lora_B["default"].weight
    )
    torch.testing.assert_close(found, expected)
