# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`ensure_weight_tying` on adapted layers: one adapter for the embedding and the output layer, merged once in each."""

import copy
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
pytestmark = pytest.mark.filterwarnings("ignore:save_embedding_layers")


def base(tied=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval()


def tuned(*targets, tied=True, **options):
    options = {"r": 2, "target_modules": ["q_proj", *targets], "ensure_weight_tying": True, **options}
    torch.manual_seed(1)
    return get_peft_model(base(tied), LoraConfig(**options)).eval()


def layers(model):
    return model.base_model.model.model.embed_tokens, model.base_model.model.lm_head


def fill(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name or "q_proj.lora" in name:
                parameter.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model


def both_updates(model):
    embedding, head = layers(model)
    return embedding.get_delta_weight("default"), head.get_delta_weight("default")


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_both_layers_have_one_update(targets):
    model = fill(tuned(*targets))
    first, second = both_updates(model)
    assert first.abs().max() > 0
    torch.testing.assert_close(first, second)
    assert layers(model)[0].base_layer.weight is layers(model)[1].base_layer.weight


def test_rank_and_alpha_are_the_embeddings():
    model = fill(tuned("lm_head", rank_pattern={"embed_tokens": 3, "lm_head": 5}, alpha_pattern={"embed_tokens": 6}))
    embedding, head = layers(model)
    assert embedding.r["default"] == head.r["default"] == 3
    assert embedding.scaling["default"] == head.scaling["default"] == 2.0


def test_gradients_of_both_uses_add_up_in_the_embeddings_factors():
    model = fill(tuned("embed_tokens"))
    loose = fill(tuned("embed_tokens", "lm_head", ensure_weight_tying=False))
    embedding, head = layers(loose)
    source = layers(model)[0]
    with torch.no_grad():
        for name in ("lora_embedding_A", "lora_embedding_B"):
            getattr(embedding, name)["default"].copy_(getattr(source, name)["default"])
        head.lora_A["default"].weight.copy_(source.lora_embedding_B["default"].t())
        head.lora_B["default"].weight.copy_(source.lora_embedding_A["default"].t())
    for one in (model, loose):
        one(input_ids=IDS, labels=IDS).loss.backward()
    summed = embedding.lora_embedding_A["default"].grad + head.lora_B["default"].weight.grad.t()
    torch.testing.assert_close(source.lora_embedding_A["default"].grad, summed)
    summed = embedding.lora_embedding_B["default"].grad + head.lora_A["default"].weight.grad.t()
    torch.testing.assert_close(source.lora_embedding_B["default"].grad, summed)


def test_an_optimizer_keeps_them_equal_also_after_a_move():
    model = copy.deepcopy(fill(tuned("embed_tokens")).double())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = both_updates(model)
    torch.testing.assert_close(first, second)
    state = model.state_dict()
    prefix = "base_model.model."
    torch.testing.assert_close(
        state[f"{prefix}lm_head.lora_A.default.weight"],
        state[f"{prefix}model.embed_tokens.lora_embedding_B.default"].t(),
    )


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("ensure", [False, True])
def test_a_merge_counts_each_update_once(use_dora, ensure):
    model = fill(tuned("embed_tokens", "lm_head", use_dora=use_dora, ensure_weight_tying=ensure))
    embedding, head = layers(model)
    weight = embedding.base_layer.weight.detach().clone()
    with torch.no_grad():
        y = model(input_ids=IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert embedding.base_layer.weight is head.base_layer.weight
        torch.testing.assert_close(embedding.base_layer.weight, weight, rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)
            plain = model.merge_and_unload()
        torch.testing.assert_close(plain(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-5)
    together = not use_dora and ensure  # the embedding's gain is by dimension, the output layer's by token
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == together
    assert plain.config.tie_word_embeddings == together


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(use_dora, low_cpu_mem_usage, tmp_path):
    model = fill(tuned("embed_tokens", use_dora=use_dora))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    first, second = both_updates(loaded)
    torch.testing.assert_close(first, second)


def test_a_start_that_changes_the_shared_weight_keeps_the_output():
    y = base()(input_ids=IDS).logits
    torch.testing.assert_close(
        tuned("embed_tokens", init_lora_weights="pissa")(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-5
    )


def test_a_second_adapter_is_tied_too():
    model = tuned("embed_tokens")
    config = LoraConfig(r=3, target_modules=["lm_head"], ensure_weight_tying=True, init_lora_weights=False)
    model.add_adapter("second", config)
    embedding, head = layers(model)
    torch.testing.assert_close(embedding.get_delta_weight("second"), head.get_delta_weight("second"))
    assert embedding.get_delta_weight("second").abs().max() > 0


@pytest.mark.parametrize(
    ("tied", "targets", "message"), [(True, [], "none of the tied layers"), (False, ["lm_head"], "no tied embeddings")]
)
def test_a_setting_without_effect_warns(tied, targets, message):
    with pytest.warns(PeftWarning, match=message):
        tuned(*targets, tied=tied)


def test_an_embedding_that_is_trained_whole_with_its_output_layer_gets_no_adapter():
    with pytest.warns(PeftWarning, match="embed_tokens gets no adapter: modules_to_save trains a layer whole"):
        model = tuned("embed_tokens", modules_to_save=["lm_head"])
    assert not any("lora" in name for name, _ in layers(model)[0].named_parameters())
    assert model.base_model.targeted_module_names == ["model.layers.0.self_attn.q_proj"]
    embedding, head = layers(model)
    embedding.weight.data.normal_()
    assert torch.equal(embedding.weight, head.weight)


def test_an_output_layer_cannot_be_adapted_and_follow_an_embedding_that_is_trained_whole():
    with pytest.raises(TypeError, match="modules_to_save names a module with an adapter already"):
        tuned("lm_head", modules_to_save=["embed_tokens"])
