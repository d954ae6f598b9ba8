# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA through transformers' own methods, `Auto` classes, pipelines and generation."""

from __future__ import annotations

import pytest
import torch
from loop_models import IDS, adapted, dora, llama, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

from peft import AutoPeftModelForCausalLM, PeftModel

QUANTISED = pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
PROMPTS = IDS[:2, 3:8]  # without the padding token


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def differ(*outputs):
    return not any(torch.allclose(a, b, atol=1e-2) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter on disk, as `save_pretrained` leaves them, and the model that they came from."""
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    base.add_adapter(dora(task_type="CAUSAL_LM", init_lora_weights=False))
    base.save_pretrained(tmp_path / "adapter")
    return base, tmp_path


# ---- transformers' methods -----------------------------------------------------------------------------------------
@pytest.mark.works_with(
    "transformers",
    "`add_adapter`, `load_adapter`, `set_adapter`, `disable_adapters`, `enable_adapters`, `delete_adapter`",
)
@QUANTISED
def test_adapters_are_added_switched_and_disabled(tmp_path, quantised):
    model = llama(quantised)
    base = logits(model)  # on a CPU with AVX512-BF16 a layer's first product rounds NF4's scales to bf16
    for name in ("first", "second"):
        model.add_adapter(dora(init_lora_weights=False), adapter_name=name)
    model.set_adapter("first")
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert differ(base, first, second)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    rounding = {"rtol": 0, "atol": 2e-3 if quantised else 0}
    torch.testing.assert_close(logits(model), second, **rounding)
    model.save_pretrained(tmp_path / "second")
    again = llama(quantised)
    again.load_adapter(tmp_path / "second", "again")
    assert again.active_adapters() == ["again"]
    torch.testing.assert_close(logits(again), second, **rounding)
    model.delete_adapter("second")
    model.set_adapter("first")
    torch.testing.assert_close(logits(model), first, **rounding)


@QUANTISED
def test_an_added_adapter_trains_and_the_base_does_not(quantised):
    model = llama(quantised)
    torch.manual_seed(1)
    model.add_adapter(dora())
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == 2 * 7 * 3
    assert all("lora_" in name for name in gradients)
    expected = adapted(quantised).train()
    expected(input_ids=IDS, labels=IDS).loss.backward()
    names = dict(expected.base_model.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, names[name].grad)


# ---- from_pretrained -----------------------------------------------------------------------------------------------
@pytest.mark.works_with("transformers", "`from_pretrained` of an adapter")
def test_an_adapters_folder_is_loaded_as_a_model(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    assert loaded.active_adapters() == ["default"]
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")), logits(model))


@pytest.mark.works_with("transformers", "`from_pretrained` of an adapter onto a quantised base")
def test_an_adapters_folder_is_loaded_onto_a_quantised_base(saved):
    pytest.importorskip("bitsandbytes")
    _, folder = saved
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "adapter", quantization_config=nf4, device_map="cpu")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=nf4, device_map="cpu")
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    expected = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(logits(loaded), logits(expected))


# ---- pipelines -----------------------------------------------------------------------------------------------------
@pytest.mark.works_with("transformers", "`pipeline`")
@pytest.mark.filterwarnings("ignore")
def test_pipelines_run_adapted_models(saved):
    model, folder = saved
    words = AutoTokenizer.from_pretrained(folder / "base")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    texts = []
    for source in (model, AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"), str(folder / "adapter")):
        run = pipeline("text-generation", model=source, tokenizer=words, device="cpu")
        texts.append(run("w3 w7 w1", **options)[0]["generated_text"])
    assert texts[0] == texts[1] == texts[2]
    plain = pipeline("text-generation", model=str(folder / "base"), tokenizer=words, device="cpu")
    assert plain("w3 w7 w1", **options)[0]["generated_text"] != texts[0]


# ---- generation ----------------------------------------------------------------------------------------------------
def greedy(model, **options):
    return model.eval().generate(PROMPTS, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


@pytest.mark.works_with("transformers", "`generate` with static and dynamic caches")
@QUANTISED
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_caches_do_not_change_what_is_generated(quantised, merged):
    model = adapted(quantised, init_lora_weights=False)
    if merged:
        model.merge_adapter()
    ids = PROMPTS
    with torch.no_grad():
        for _ in range(8):
            scores = model.eval()(ids).logits[:, -1]
            scores[:, 2] = -torch.inf  # no end within what was asked for
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy(model, use_cache=False), ids)
    assert torch.equal(greedy(model, cache_implementation="dynamic"), ids)
    assert torch.equal(greedy(model, cache_implementation="static"), ids)
    assert not torch.equal(greedy(llama(quantised)), ids)


def test_beams_and_samples_are_those_of_the_merged_model():
    model = adapted(init_lora_weights=False).eval()
    outputs = []
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        torch.manual_seed(3)
        sampled = model.generate(PROMPTS, max_new_tokens=6, do_sample=True, cache_implementation="static")
        outputs.append((sampled, greedy(model, num_beams=3)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
