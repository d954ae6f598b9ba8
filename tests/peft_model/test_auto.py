# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`AutoPeftModel…`: base model and adapter in one call, and what may be imported for it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import bert_config, llama, logits, lora, t5

import peft
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from peft.auto import check_import_allowlist, get_default_import_allowlist


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def base_folder(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make(base_folder, tmp_path):
    def build(**options):
        base = transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval()
        torch.manual_seed(1)
        model = get_peft_model(base, lora(**options)).eval()
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        return model, folder

    return build


def test_by_task(make):
    model, folder = make()
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is peft.PeftModelForCausalLM and torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        folder, adapter_name="mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert loaded.active_adapter == "mine" and loaded.base_model_torch_dtype == torch.bfloat16
    assert loaded.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize(
    ("auto", "task", "base"),
    [
        ("AutoPeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM", t5),
        (
            "AutoPeftModelForSequenceClassification",
            "SEQ_CLS",
            lambda: transformers.BertForSequenceClassification(bert_config()),
        ),
        (
            "AutoPeftModelForTokenClassification",
            "TOKEN_CLS",
            lambda: transformers.BertForTokenClassification(bert_config()),
        ),
        (
            "AutoPeftModelForQuestionAnswering",
            "QUESTION_ANS",
            lambda: transformers.BertForQuestionAnswering(bert_config()),
        ),
        ("AutoPeftModelForFeatureExtraction", "FEATURE_EXTRACTION", lambda: transformers.BertModel(bert_config())),
    ],
)
def test_every_task(tmp_path, auto, task, base):
    base().save_pretrained(tmp_path / "base")
    model = base()
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(task_type=task, r=2)).save_pretrained(tmp_path / "adapter")
    loaded = getattr(peft, auto).from_pretrained(tmp_path / "adapter")
    assert type(loaded) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]


def test_task_and_class_must_agree(make):
    _, folder = make()
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        peft.AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="use AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(folder)


def test_without_a_task(make):
    model, folder = make(task_type=None)
    loaded = AutoPeftModel.from_pretrained(folder)
    assert type(loaded) is peft.PeftModel and torch.equal(logits(loaded), logits(model))
    assert type(AutoPeftModelForCausalLM.from_pretrained(folder)) is peft.PeftModelForCausalLM


def test_imports_are_limited(make):
    _, folder = make(task_type=None)
    edit(folder, auto_mapping={"base_model_class": "X", "parent_library": "this_is_not_there.models"})
    with pytest.raises(ValueError, match="this_is_not_there"):
        AutoPeftModel.from_pretrained(folder)
    with pytest.raises(ModuleNotFoundError):
        AutoPeftModel.from_pretrained(folder, import_allowlist=["this_is_not_there"])
    edit(folder, auto_mapping=None)
    with pytest.raises(ValueError, match="neither a task_type nor an auto_mapping"):
        AutoPeftModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("transformers", True),
        ("transformers.models.llama", True),
        ("transformersx", False),
        ("evil.transformers", False),
        ("", False),
    ],
)
def test_allowlist(name, allowed):
    assert check_import_allowlist(["transformers"], name) is allowed
    assert get_default_import_allowlist() == ["diffusers", "lerobot", "megatron-core", "transformers"]


def test_a_nameless_base_model_is_refused(make):
    _, folder = make()
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base model"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_embeddings_fit_the_saved_tokenizer(make):
    from tokenizers import Tokenizer, models

    _, folder = make()
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(36)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert loaded.get_input_embeddings().weight.shape[0] == 36


def test_instances_are_not_made():
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModelForCausalLM()
