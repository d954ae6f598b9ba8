# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The classes for the tasks: heads, forward signatures, training through them."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from tiny_models import IDS, bert_config, llama, t5

import peft
from peft import LoraConfig, PeftModel, get_peft_model

CLASSES = {
    "SEQ_CLS": ("PeftModelForSequenceClassification", "BertForSequenceClassification"),
    "TOKEN_CLS": ("PeftModelForTokenClassification", "BertForTokenClassification"),
    "QUESTION_ANS": ("PeftModelForQuestionAnswering", "BertForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("PeftModelForFeatureExtraction", "BertModel"),
}
HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
    "FEATURE_EXTRACTION": None,
}
LABELS = {
    "SEQ_CLS": {"labels": torch.tensor([0, 2])},
    "TOKEN_CLS": {"labels": torch.ones_like(IDS)},
    "QUESTION_ANS": {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
}


def build(task, **options):
    torch.manual_seed(0)
    config = bert_config()
    if task == "QUESTION_ANS":
        config.num_labels = 2
    base = getattr(transformers, CLASSES[task][1])(config).eval()
    return get_peft_model(base, LoraConfig(task_type=task, r=2, init_lora_weights=False, **options)).eval()


@pytest.mark.parametrize("task", CLASSES)
def test_class_and_head(task):
    model = build(task)
    assert type(model) is getattr(peft, CLASSES[task][0])
    assert model.peft_config["default"].modules_to_save == HEADS[task]
    assert model.modules_to_save == (set(HEADS[task]) if HEADS[task] else None)
    head = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert all("modules_to_save.default" in name for name in head)
    assert bool(head) == bool(HEADS[task])


@pytest.mark.parametrize("task", CLASSES)
def test_further_adapters_get_a_head_too(task, tmp_path):
    model = build(task)
    model.add_adapter("second", LoraConfig(task_type=task, r=2, init_lora_weights=False))
    assert model.peft_config["second"].modules_to_save == HEADS[task]
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.add_(1.0)
        expected = model(IDS)[0]
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(task).unload(), tmp_path / "second", adapter_name="x").eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], expected)


@pytest.mark.parametrize("task", LABELS)
def test_training_reaches_adapter_and_head(task):
    model = build(task)
    loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **LABELS[task]).loss
    loss.backward()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and name.endswith("weight")}
    assert len(weights) == 5
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights.values())


@pytest.mark.parametrize("task", CLASSES)
def test_arguments_reach_the_base_model(task):
    model = build(task)
    with torch.no_grad():
        kinds = torch.ones_like(IDS)
        merged = build(task).merge_and_unload()(input_ids=IDS, token_type_ids=kinds)[0]
        assert torch.allclose(model(IDS, token_type_ids=kinds, task_ids=torch.tensor([0]))[0], merged, atol=1e-5)
        assert not torch.allclose(model(IDS)[0], merged, atol=1e-4)
        embedded = model.get_base_model().get_input_embeddings()(IDS)
        assert torch.allclose(model(inputs_embeds=embedded)[0], model(IDS)[0], atol=1e-6)
        output = model(IDS, output_hidden_states=True)
        assert len(output.hidden_states) == 2
        assert isinstance(model(IDS, return_dict=False), tuple)


def test_question_answering_without_token_types():
    """Architectures that know no token types get none."""
    config = llama().config
    base = transformers.LlamaForQuestionAnswering(config).eval()
    model = get_peft_model(base, LoraConfig(task_type="QUESTION_ANS", r=2))
    assert model(IDS).start_logits.shape == IDS.shape


def test_a_head_named_by_the_user_is_listed_once():
    config = LoraConfig(task_type="TOKEN_CLS", r=2, modules_to_save=["classifier"])
    get_peft_model(transformers.BertForTokenClassification(bert_config()), config)
    assert config.modules_to_save == ["classifier", "score"]


def test_token_classification_needs_a_config():
    with pytest.raises(ValueError, match="peft_config=None"):
        peft.PeftModelForTokenClassification(transformers.BertForTokenClassification(bert_config()))


def test_seq2seq():
    torch.manual_seed(1)
    model = get_peft_model(t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, init_lora_weights=False)).eval()
    assert type(model) is peft.PeftModelForSeq2SeqLM
    model(IDS, labels=IDS).loss.backward()
    torch.manual_seed(1)
    merged = get_peft_model(
        t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, init_lora_weights=False)
    ).merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(
            model(IDS, decoder_input_ids=IDS).logits, merged(IDS, decoder_input_ids=IDS).logits, atol=1e-5
        )
    tokens = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, merged.generate(input_ids=IDS, max_new_tokens=3, do_sample=False))
    with pytest.raises(TypeError):
        model.generate(IDS)


COMMON = ["input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states"]
SIGNATURES = {
    "PeftModelForCausalLM": [*COMMON, "return_dict", "task_ids", "kwargs"],
    "PeftModelForSequenceClassification": [*COMMON, "return_dict", "task_ids", "kwargs"],
    "PeftModelForTokenClassification": [*COMMON, "return_dict", "task_ids", "kwargs"],
    "PeftModelForFeatureExtraction": [
        *(name for name in COMMON if name != "labels"),
        "return_dict",
        "task_ids",
        "kwargs",
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = list(inspect.signature(getattr(peft, name).forward).parameters)
    assert parameters == ["self", *SIGNATURES[name]]
