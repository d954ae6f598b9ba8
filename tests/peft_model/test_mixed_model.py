# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`PeftMixedModel`: several adapters at once, switched, merged, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from tiny_models import IDS, llama, logits, lora, trained

from peft import PeftMixedModel, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES, MixedModel


def mixed():
    base = llama()
    torch.manual_seed(1)
    model = get_peft_model(base, lora(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", lora(r=3, target_modules=["q_proj", "up_proj"]))
    return model.eval()


def test_what_is_inside():
    model = mixed()
    assert type(model) is PeftMixedModel and type(model.base_model) is MixedModel and not isinstance(model, PeftModel)
    assert model.active_adapter == model.active_adapters == ["default"] and trained(model) == {"default"}
    assert model.config is model.get_base_model().config and model.modules_to_save is None
    assert model.peft_config is model.base_model.peft_config
    assert COMPATIBLE_TUNER_TYPES == ("LORA",)
    with pytest.raises(AttributeError):
        _ = model.nothing_of_that_name


def test_active_adapters_add_up():
    model = mixed()
    model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"] and trained(model) == {"default", "other"}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16)
    deltas = [layer.get_delta_weight(name) for name in ("default", "other")]
    assert torch.allclose(layer(x), x @ (layer.weight + sum(deltas)).T, atol=1e-5)
    both = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), both, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model.merge_and_unload()), both, atol=1e-5)


def test_disabling_and_unloading():
    model = mixed()
    expected = logits(llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected) and not trained(model)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    assert torch.equal(model.generate(IDS, max_new_tokens=1)[:, :4], IDS)
    assert torch.equal(logits(model.unload()), expected)


def test_deleting():
    model = mixed()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and list(model.peft_config) == ["other"]
    model.delete_adapter(["other"])
    assert torch.equal(logits(model), logits(llama()))


def test_status(capsys):
    model = mixed()
    assert model.get_model_status().adapter_model_type == "MixedModel"
    assert len(model.get_layer_status()) == 4
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {model.get_nb_trainable_parameters()[0]:,d}")


@pytest.mark.parametrize("safe_serialization", [False, True])
def test_saving_and_loading(tmp_path, safe_serialization):
    model = mixed()
    model.set_adapter(["default", "other"])
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = PeftMixedModel.from_pretrained(llama(), tmp_path)
    assert not loaded.training and not trained(loaded)
    loaded.load_adapter(tmp_path / "other", "other", is_trainable=True)
    assert trained(loaded) == {"other"}
    loaded.set_adapter(["default", "other"])
    assert torch.equal(logits(loaded), logits(model))
    alone = PeftModel.from_pretrained(llama(), tmp_path / "other")
    model.set_adapter("other")
    assert torch.equal(logits(alone), logits(model))


def test_a_failed_load_gives_the_base_model_back(tmp_path):
    mixed().save_pretrained(tmp_path, safe_serialization=True)
    other = tmp_path / "other"
    base = llama()
    with pytest.raises(RuntimeError, match="lora_A"):
        PeftMixedModel.from_pretrained(base, tmp_path, config=lora(r=5, target_modules=["q_proj"]))
    assert torch.equal(logits(base), logits(llama()))
    (other / "adapter_model.safetensors").write_bytes(b"x")
    model = PeftMixedModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        model.load_adapter(other, "other")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_adapter(["default", "x"]), "'x'"),
        (lambda m: m.delete_adapter("x"), "'x'"),
        (lambda m: m.add_adapter("default", lora()), "already"),
        (lambda m: m.add_adapter("new", TrainableTokensConfig(token_indices=[1])), "TRAINABLE_TOKENS.*LORA"),
    ],
)
def test_refusals(call, message):
    model = mixed()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert list(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]


def test_modules_to_save():
    model = mixed()
    model.add_adapter("head", lora(modules_to_save=["lm_head"], target_modules=["q_proj"]))
    assert model.modules_to_save == {"lm_head"}
    model.set_adapter("head")
    assert any("lm_head.modules_to_save.head" in n for n, p in model.named_parameters() if p.requires_grad)
