# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers with `peft_config`: they learn, their reference is the base without the adapter, it alone is saved."""

from __future__ import annotations

import pytest
import torch
from loop_models import adapted, arguments, dora, llama, losses, tokenizer

pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets")

from transformers import LlamaForSequenceClassification  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft import PeftModel  # noqa: E402

QUANTISED = pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
TEXTS = ["w3 w7 w1 w4 w9", "w8 w2 w2 w5 w6"] * 4
PAIRS = {"prompt": ["w3 w7"] * 8, "chosen": [" w1 w4 w9"] * 8, "rejected": [" w2 w2 w5"] * 8}

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(kind, config, folder, model, data, peft_config=None, run=True, **options):
    settings = {"max_steps": 4, "save_strategy": "no", "bf16": False, **options}
    data = datasets.Dataset.from_dict(data)
    more = {"reward_funcs": settings.pop("reward_funcs")} if "reward_funcs" in settings else {}
    trainer = kind(
        model=model,
        args=arguments(folder, config, **settings),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
        **more,
    )
    if run:
        trainer.train()
    return trainer


def assert_only_the_adapter_was_trained(trainer, base) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, PeftModel) and model.peft_config["default"].use_dora
    weights = {name.replace(".base_layer", ""): p for name, p in model.base_model.model.named_parameters()}
    for name, parameter in base.named_parameters():
        if name in weights:
            assert torch.equal(weights[name].data, parameter.data), name
    factors = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert factors and all(parameter.abs().sum() > 0 for parameter in factors)


@pytest.mark.works_with("TRL", "`SFTTrainer`")
@QUANTISED
def test_supervised(tmp_path, quantised):
    config = dora(task_type="CAUSAL_LM")
    options = {"max_length": 16, "max_steps": 8, "save_strategy": "steps", "save_steps": 8}
    trainer = fit(SFTTrainer, SFTConfig, tmp_path, llama(quantised), {"text": TEXTS}, config, **options)
    assert min(losses(trainer)[-2:]) < 0.95 * losses(trainer)[0]
    assert_only_the_adapter_was_trained(trainer, llama(quantised))
    ids = torch.tensor([[6, 10, 4, 7]])
    again = PeftModel.from_pretrained(llama(quantised), tmp_path / "checkpoint-8").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.works_with("TRL", "packing, checkpointing, bf16")
@pytest.mark.parametrize("options", [{"packing": True}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_supervised_with_options(tmp_path, options):
    config = dora(task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = fit(SFTTrainer, SFTConfig, tmp_path, llama(), {"text": TEXTS}, config, max_length=16, **options)
    assert_only_the_adapter_was_trained(trainer, llama())


def log_probability(model, prompt: str, completion: str) -> float:
    words = tokenizer()
    start = len(words(prompt)["input_ids"])
    ids = torch.tensor([words(prompt + completion)["input_ids"] + [words.eos_token_id]])
    with torch.no_grad():
        scores = model.eval()(ids).logits.log_softmax(-1)[0, :-1]
    return scores.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


@pytest.mark.works_with("TRL", "`DPOTrainer`, its reference the base without the adapter")
@QUANTISED
def test_preferences_are_judged_beside_the_base_without_the_adapter(tmp_path, quantised):
    config = dora(task_type="CAUSAL_LM", init_lora_weights=False)
    base, tuned = llama(quantised), adapted(quantised, init_lora_weights=False)
    torch.manual_seed(1)
    options = {"max_length": 16, "beta": 0.5}
    trainer = fit(DPOTrainer, DPOConfig, tmp_path, llama(quantised), PAIRS, config, run=False, **options)
    trainer.model.load_state_dict(tuned.state_dict(), strict=False)
    trainer.train()
    assert trainer.ref_model is None
    for kind in ("chosen", "rejected"):
        prompt, text = PAIRS["prompt"][0], PAIRS[kind][0]
        expected = 0.5 * (log_probability(tuned, prompt, text) - log_probability(base, prompt, text))
        assert abs(expected) > 0.01
        assert losses(trainer, f"rewards/{kind}")[0] == pytest.approx(expected, rel=0.02, abs=2e-3)
    assert losses(trainer, "rewards/margins")[-1] > losses(trainer, "rewards/margins")[0] + 0.1


@pytest.mark.works_with("TRL", "`GRPOTrainer`")
@QUANTISED
def test_group_relative_policy(tmp_path, quantised):
    def many_words(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "reward_funcs": many_words}
    config = dora(task_type="CAUSAL_LM")
    data = {"prompt": PAIRS["prompt"]}
    trainer = fit(GRPOTrainer, GRPOConfig, tmp_path, llama(quantised), data, config, **options)
    assert trainer.ref_model is None
    kl = losses(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 1e-4
    assert_only_the_adapter_was_trained(trainer, llama(quantised))


def scorer():
    config = llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


@pytest.mark.works_with("TRL", "`RewardTrainer`")
def test_rewards(tmp_path):
    data = {"chosen": ["w3 w7 w1"] * 8, "rejected": ["w8 w2 w5"] * 8}
    config = dora(task_type="SEQ_CLS")
    options = {"max_length": 16, "save_strategy": "steps", "save_steps": 4}
    trainer = fit(RewardTrainer, RewardConfig, tmp_path, scorer(), data, config, **options)
    assert losses(trainer)[-1] < losses(trainer)[0]
    ids = torch.tensor([[6, 10, 4]])
    again = PeftModel.from_pretrained(scorer(), tmp_path / "checkpoint-4").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)
