# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA inside transformers' own training loop: checkpointing changes nothing, a run resumes, the adapter comes out."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

IDS = torch.arange(96).reshape(6, 16) % 32
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def llama(quantised=False):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    if not quantised:
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def adapted(quantised=False, **options):
    model = llama(quantised)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True, **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(quantised, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(quantised, init_lora_weights=False).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 7 * 3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        logging_steps=1,
        **options,
    )


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "nf4"])
def test_trainer_learns_and_its_checkpoint_is_an_adapter(tmp_path, quantised):
    model = adapted(quantised)
    trainer = Trainer(model, arguments(tmp_path, max_steps=6, save_steps=3), train_dataset=DATA)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.93 * losses[0]
    model.eval()
    again = PeftModel.from_pretrained(llama(quantised), tmp_path / "checkpoint-6").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = Trainer(adapted(), arguments(tmp_path, max_steps=6, save_steps=3), train_dataset=DATA)
    whole.train()
    resumed = Trainer(adapted(), arguments(tmp_path, max_steps=6, save_steps=3), train_dataset=DATA)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, expected), found in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
