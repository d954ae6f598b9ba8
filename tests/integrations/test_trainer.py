# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA inside transformers' own training loop: in each precision, accumulated, checkpointed, compiled and resumed."""

from __future__ import annotations

import json

import pytest
import torch
from loop_models import DATA, IDS, adapted, arguments, llama, losses, trained_state
from transformers import Trainer, TrainerCallback

from peft import PeftModel

QUANTISED = pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])


def fit(folder, model=None, data=None, resume=None, **options):
    """A run of six steps, or as many as `options` say; the trainer after it."""
    settings = {"max_steps": 6, "save_strategy": "no", **options}
    trainer = Trainer(adapted() if model is None else model, arguments(folder, **settings), train_dataset=data or DATA)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- precision -----------------------------------------------------------------------------------------------------
@pytest.mark.works_with("transformers", "`Trainer` on bases in fp32, bf16, fp16 and NF4")
@QUANTISED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_learns_with_a_base_of_each_dtype(tmp_path, dtype, quantised):
    trainer = fit(tmp_path, adapted(quantised, dtype), bf16=dtype == torch.bfloat16)
    assert losses(trainer)[-1] < 0.95 * losses(trainer)[0]
    assert {value.dtype for value in trained_state(trainer.model).values()} == {torch.float32}


@pytest.mark.works_with("transformers", "`bf16=True`")
@QUANTISED
def test_bf16_is_close_to_fp32(tmp_path, quantised):
    exact = losses(fit(tmp_path, adapted(quantised), max_steps=3))
    rounded = losses(fit(tmp_path, adapted(quantised), max_steps=3, bf16=True))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.works_with("torch", "float16 autocast with a loss scaler")
@QUANTISED
def test_float16_autocast_with_a_loss_scaler(quantised):
    """What `fp16=True` does on a GPU; on a CPU accelerate leaves it out."""
    gradients = []
    for low in (False, True):
        model = adapted(quantised, init_lora_weights=False).train()
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        scaler = torch.amp.GradScaler("cpu", enabled=low, init_scale=16.0)
        with torch.autocast("cpu", torch.float16, enabled=low):
            loss = model(input_ids=IDS, labels=IDS).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        before = trained_state(model)
        scaler.step(optimizer)
        scaler.update()
        assert all(not torch.equal(value, before[name]) for name, value in trained_state(model).items())
    for name, exact in gradients[0].items():
        error = (gradients[1][name] - exact).norm() / exact.norm()
        assert 0 < error < 0.02, f"{name}: {error:.1e}"


@pytest.mark.works_with("transformers", "`fp16=True`")
@pytest.mark.gpu
@QUANTISED
def test_fp16_with_a_loss_scaler(tmp_path, quantised):
    trainer = fit(tmp_path, adapted(quantised).cuda(), fp16=True, max_steps=20)  # the first ones find the loss scale
    assert losses(trainer)[-1] < 0.95 * losses(trainer)[0]


# ---- accumulation and checkpointing --------------------------------------------------------------------------------
@pytest.mark.works_with("transformers", "gradient accumulation")
@QUANTISED
def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path, quantised):
    settings = {"learning_rate": 1e-3, "max_steps": 3}
    whole = fit(tmp_path, adapted(quantised), **settings)
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    parts = fit(tmp_path, adapted(quantised), **settings)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    for name, value in trained_state(whole.model).items():
        torch.testing.assert_close(trained_state(parts.model)[name], value, rtol=1e-3, atol=1e-4)


@QUANTISED
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


@pytest.mark.works_with("transformers", "gradient checkpointing of both kinds")
@QUANTISED
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_leaves_the_losses_as_they_are(tmp_path, quantised, use_reentrant):
    dropped = {"lora_dropout": 0.1}
    plain = fit(tmp_path, adapted(quantised, **dropped), max_steps=3)
    kwargs = {"use_reentrant": use_reentrant}
    checkpointed = fit(
        tmp_path,
        adapted(quantised, **dropped),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
        max_steps=3,
    )
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-4)


# ---- compilation ---------------------------------------------------------------------------------------------------
@pytest.mark.works_with("transformers", "`torch_compile=True`, one graph")
@QUANTISED
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_compiled_training_gives_the_same_losses(tmp_path, quantised, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = fit(tmp_path, adapted(quantised), max_steps=3, torch_compile=True, torch_compile_backend=backend)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(fit(tmp_path, adapted(quantised), max_steps=3)), rel=1e-4)


def test_compiled_training_with_dropout_gives_the_same_losses(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"max_steps": 4, "learning_rate": 5e-2}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = [fit(tmp_path, adapted(lora_dropout=0.2), **settings, **more) for more in (compiled, {})]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


# ---- checkpoints ---------------------------------------------------------------------------------------------------
@QUANTISED
def test_a_checkpoint_is_an_adapter(tmp_path, quantised):
    trainer = fit(tmp_path, adapted(quantised), save_strategy="steps", save_steps=3)
    assert losses(trainer)[-1] < 0.93 * losses(trainer)[0]
    model = trainer.model.eval()
    assert not list((tmp_path / "checkpoint-6").glob("model*"))
    again = PeftModel.from_pretrained(llama(quantised), tmp_path / "checkpoint-6").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.works_with("transformers", "resuming with the very losses of a whole run")
@pytest.mark.parametrize(
    ("quantised", "options", "run"),
    [
        (False, {}, {}),
        (True, {}, {}),
        (False, {"lora_dropout": 0.2}, {}),
        (False, {}, {"bf16": True}),
        (False, {"modules_to_save": ["lm_head"]}, {}),
        (True, {"lora_dropout": 0.2}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
    ids=["dense", "nf4", "dropout", "bf16", "modules-to-save", "nf4-dropout-checkpointing-accumulation"],
)
def test_a_resumed_run_has_the_very_losses_of_a_whole_one(tmp_path, quantised, options, run):
    saving = {"save_strategy": "steps", "save_steps": 3, **run}
    whole = fit(tmp_path, adapted(quantised, **options), **saving)
    resumed = fit(tmp_path, adapted(quantised, **options), resume=str(tmp_path / "checkpoint-3"), **saving)
    assert len(losses(whole)) == 6
    assert losses(resumed) == losses(whole)
    for name, expected in trained_state(whole.model).items():
        assert torch.equal(trained_state(resumed.model)[name], expected), name


class Diverge(TrainerCallback):
    """After the fifth step, writes rubbish into the adapter: the checkpoint before it stays the best."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(3)


@pytest.mark.works_with("transformers", "`load_best_model_at_end`")
@QUANTISED
def test_the_best_model_is_loaded_at_the_end(tmp_path, quantised):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    trainer = Trainer(
        adapted(quantised),
        arguments(tmp_path, load_best_model_at_end=True, **settings),
        train_dataset=DATA,
        eval_dataset=DATA,
        callbacks=[Diverge()],
    )
    trainer.train()
    evaluated = losses(trainer, "eval_loss")
    assert evaluated[2] > evaluated[1] < evaluated[0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = PeftModel.from_pretrained(llama(quantised), tmp_path / "checkpoint-4").eval()
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(IDS).logits, best(IDS).logits)
    assert trainer.evaluate()["eval_loss"] == evaluated[1]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text("utf-8"))
    assert state["best_metric"] == evaluated[1]
