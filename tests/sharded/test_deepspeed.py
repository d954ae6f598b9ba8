# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA under DeepSpeed's ZeRO: real engines where deepspeed is installed, and the protocol of its partitioned
parameters (`ds_id`, `ds_tensor`, `ds_status`) where it is not."""

from __future__ import annotations

import enum
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_ddp_fsdp2 import Collectives, device, logits_around_writes, logits_around_writes_alone
from test_state_dicts import changed
from tiny import Run, adapted, base_model, batches, checkpointed, compare, mean_over_ranks, own_rows, train, trained
from torch import nn

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.dora import row_norm
from peft.weights import find_weight
from peft.weights.sharded import ShardedWeight

OPTIONS = {"dora": {}, "triton": {"use_dora_triton": True}, "lora": {"use_dora": False}}
pytestmark = pytest.mark.filterwarnings("ignore:use_dora_triton", "ignore::FutureWarning")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def settings(stage: int, persistent: int = 0) -> dict[str, Any]:
    """Nothing is too small to be partitioned unless `persistent` elements say so."""
    world = torch.distributed.get_world_size()
    return {
        "train_micro_batch_size_per_gpu": 4 // world,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent},
    }


def base_in_partitions(**shape: Any) -> nn.Module:
    """The base as `from_pretrained` leaves it under ZeRO-3: partitioned before adapters come into it."""
    import deepspeed

    base = base_model(device(), **shape)
    deepspeed.zero.Init(module=base, config_dict_or_path=settings(3))
    return base


def engine_of(model: nn.Module, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a model, with plain gradient descent."""
    import deepspeed

    parameters = [parameter for _, parameter in trained(model)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)[0]


def zero(
    options: dict[str, Any],
    stage: int,
    persistent: int = 0,
    partitioned: bool = False,
    state: dict[str, torch.Tensor] | None = None,
    use_reentrant: bool | None = None,
    **shape: Any,
) -> Run:
    """What an engine trains, checkpointed where `use_reentrant` says how.

    `state` is loaded into its adapter once the engine has everything in its hands.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    base = base_in_partitions(**shape) if partitioned else base_model(device(), **shape)
    model = adapted(base, **options)
    if use_reentrant is not None:
        checkpointed(model, use_reentrant)
    engine = engine_of(model, settings(stage, persistent))
    if state is not None:
        set_peft_model_state_dict(model, state)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses, gradients = [], []
    for batch in batches():
        ids = own_rows(batch, rank, world).to(device())
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        losses.append(mean_over_ranks(loss, world))
        gradients.append({name: safe_get_full_grad(value).float().cpu().clone() for name, value in trained(model)})
        engine.step()
    with torch.no_grad():
        ids = own_rows(batches()[0], rank, world).to(device())
        losses.append(mean_over_ranks(engine(input_ids=ids, labels=ids).loss, world))
    if stage == 3:
        found = {name: safe_get_full_fp32_param(value).cpu().clone() for name, value in trained(model)}
    else:
        found = {name: value.detach().cpu().clone() for name, value in trained(model)}
    engine.destroy()
    return Run(losses, gradients, found)


def norms_of_an_engine() -> tuple[dict[str, torch.Tensor], list[int]]:
    """Each layer's norm, taken while everything is in partitions, and the sizes of the collectives behind them."""
    model = adapted(base_model(device()))
    engine = engine_of(model, settings(3))
    found = {}
    with Collectives() as seen:
        for name, module in model.named_modules():
            if hasattr(module, "dora_norm"):
                assert isinstance(module.norm_weight(), ShardedWeight)
                found[name] = module.dora_norm("default").cpu()
    engine.destroy()
    return found, seen.sizes


@pytest.mark.works_with("DeepSpeed", "ZeRO-2 and ZeRO-3")
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", OPTIONS)
def test_zero_trains_what_one_process_trains(two, kind, stage):
    truth = train(adapted(**OPTIONS[kind]))
    for run in two.run(zero, OPTIONS[kind], stage):
        compare(run, truth)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_four_ranks_with_small_parameters_kept_whole(four, stage):
    truth = train(adapted())
    for run in four.run(zero, {}, stage, persistent=200):
        compare(run, truth)


@pytest.mark.works_with("DeepSpeed", "ZeRO with checkpointing of both kinds")
@needs_deepspeed
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpointing_under_zero(two, stage, use_reentrant):
    truth = train(adapted())
    for run in two.run(zero, {}, stage, use_reentrant=use_reentrant):
        compare(run, truth)


@needs_deepspeed
def test_an_adapter_on_a_base_that_is_in_partitions_already(two):
    shape = {"attention_bias": True}
    truth = train(adapted(base_model(**shape)))
    for run in two.run(zero, {}, 3, partitioned=True, **shape):
        compare(run, truth)


@needs_deepspeed
def test_zero3_gathers_no_weight_for_its_norm(two):
    model = adapted()
    truth = {
        name: module.dora_norm("default") for name, module in model.named_modules() if hasattr(module, "dora_norm")
    }
    smallest = min(module.base_layer.weight.numel() for module in model.modules() if hasattr(module, "dora_norm"))
    for found, sizes in two.run(norms_of_an_engine):
        assert sizes and max(sizes) < smallest
        assert found.keys() == truth.keys()
        for name, norm in found.items():
            torch.testing.assert_close(norm, truth[name], rtol=1e-6, atol=0)


def traffic_of_a_pass(options: dict[str, Any]) -> int:
    """How many entries the collectives of one forward and backward pass bring together."""
    engine = engine_of(adapted(base_model(device()), **options), settings(3))
    ids = batches()[0].to(device())
    with Collectives() as seen:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.destroy()
    return sum(seen.sizes)


@needs_deepspeed
def test_a_pass_under_zero3_gathers_each_weight_as_often_as_for_lora(two):
    layers = [module for module in adapted().modules() if hasattr(module, "dora_norm")]
    weights = sum(module.base_layer.weight.numel() for module in layers)
    for lora, dora in zip(*(two.run(traffic_of_a_pass, options) for options in (OPTIONS["lora"], {})), strict=True):
        assert lora > weights and dora - lora < weights / 2


def logits_around_writes_to_partitions() -> list[torch.Tensor]:
    model = adapted(base_model(device()))
    engine = engine_of(model, settings(3))
    logits = logits_around_writes(engine, ((name, value.ds_tensor.data) for name, value in model.named_parameters()))
    engine.destroy()
    return logits


@needs_deepspeed
def test_a_write_to_the_partitions_is_seen_by_the_next_pass(two):
    truth = logits_around_writes_alone()
    for logits in two.run(logits_around_writes_to_partitions):
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-5)


def save(folder: str, stage: int, consolidated: bool) -> None:
    """Save the adapter of an engine: by deepspeed's consolidated state dict, as Trainer does, or by the model alone."""
    config = settings(stage)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = engine_of(adapted(base_model(device())), config)
    state = engine._zero3_consolidated_16bit_state_dict() if consolidated else None
    first = torch.distributed.get_rank() == 0
    if first or not consolidated:
        engine.module.save_pretrained(folder, state_dict=state, is_main_process=first)
    torch.distributed.barrier()
    engine.destroy()


@needs_deepspeed
@pytest.mark.parametrize(("stage", "consolidated"), [(2, False), (3, True), (3, False)])
def test_what_four_ranks_hold_is_saved_whole(four, stage, consolidated, tmp_path):
    four.run(save, str(tmp_path), stage, consolidated)
    expected = get_peft_model_state_dict(adapted())
    found = get_peft_model_state_dict(PeftModel.from_pretrained(base_model(), tmp_path))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.works_with("DeepSpeed", "adapters loaded into what its engine holds")
@needs_deepspeed
@pytest.mark.parametrize(("stage", "persistent"), [(2, 0), (3, 0), (3, 200)])
def test_an_adapter_loaded_into_an_engine_is_what_trains_on(four, stage, persistent):
    saved = changed(adapted())
    state = {name: value.clone() for name, value in get_peft_model_state_dict(saved).items()}
    truth = train(saved)
    for run in four.run(zero, {}, stage, persistent, state=state):
        compare(run, truth)


def load_into_partitions(folder: str, what: str) -> torch.Tensor:
    """The logits of a model that an adapter was loaded into while its parameters were in partitions."""
    if what == "base":  # before there is an engine
        model = PeftModel.from_pretrained(base_in_partitions(), folder, is_trainable=True)
        engine = engine_of(model, settings(3))
    else:
        model = adapted(base_model(device()))
        engine = engine_of(model, settings(3))
        name = "default" if what == "same" else "second"
        model.load_adapter(folder, name, low_cpu_mem_usage=what == "second on meta")
        model.set_adapter(name)
    with torch.no_grad():
        found = engine(input_ids=batches()[0].to(device())).logits.cpu()
    engine.destroy()
    return found


@needs_deepspeed
@pytest.mark.parametrize("what", ["base", "same", "second", "second on meta"])
def test_an_adapters_folder_is_loaded_into_partitions(two, what, tmp_path):
    saved = changed(adapted())
    saved.save_pretrained(tmp_path)
    with torch.no_grad():
        truth = saved(input_ids=batches()[0]).logits
    for found in two.run(load_into_partitions, str(tmp_path), what):
        torch.testing.assert_close(found, truth)


def refused_load() -> str:
    model = adapted(base_model(device()))
    engine = engine_of(model, settings(3))
    state = {name: value[:1] for name, value in get_peft_model_state_dict(adapted()).items()}
    with pytest.raises(RuntimeError, match="Shapes of the saved adapter differ") as caught:
        set_peft_model_state_dict(model, state)
    engine.destroy()
    return str(caught.value)


@needs_deepspeed
def test_shapes_are_compared_with_those_of_the_whole(two):
    for message in two.run(refused_load):
        assert "lora_A.default.weight: saved [1, 32], here [4, 32]" in message


def fit_by_trainer(folder: str, stage: int, resume: str | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a Trainer's run of four steps with a checkpoint after two, and the adapter of its last checkpoint."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers import Trainer, TrainingArguments

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    arguments = TrainingArguments(
        folder, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        deepspeed=config, report_to=[], disable_tqdm=True, use_cpu=device() == "cpu", seed=0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in batches(steps=2).flatten(0, 1)]
    try:
        trainer = Trainer(adapted(base_model(device())), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
    finally:
        # The ranks serve other tests too.
        AcceleratorState._reset_state()
        PartialState._reset_state()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, get_peft_model_state_dict(PeftModel.from_pretrained(base_model(), f"{folder}/checkpoint-4"))


@pytest.mark.works_with("DeepSpeed", "`Trainer`, its checkpoints and resuming from them")
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainers_run_is_resumed(two, stage, tmp_path):
    whole, *others = two.run(fit_by_trainer, str(tmp_path), stage, None)
    assert whole[0][-1] < whole[0][0] and others[0][0] == whole[0]
    resumed = two.run(fit_by_trainer, str(tmp_path), stage, str(tmp_path / "checkpoint-2"))[0]
    assert resumed[0] == whole[0]
    for name, value in whole[1].items():
        assert torch.equal(resumed[1][name], value), name


class Status(enum.Enum):
    """As deepspeed's `ZeroParamStatus`, by name."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(layer: nn.Module, name: str) -> None:
    """Leave of a parameter what ZeRO-3 leaves of it: an even share of its entries, filled up at the end, and no shape."""
    parameter = layer._parameters[name]
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    entries = parameter.detach().flatten()
    share = -(-entries.numel() // world)
    padded = torch.nn.functional.pad(entries, (0, share * world - entries.numel()), value=float("nan"))
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 1, parameter.shape, entries.numel()
    parameter.ds_tensor = padded[rank * share : (rank + 1) * share].clone()
    parameter.ds_status, parameter.ds_process_group = Status.NOT_AVAILABLE, torch.distributed.group.WORLD
    parameter.data = torch.empty(0)


def partitioned_layers() -> dict[str, float]:
    """Norms and whole matrices of partitions made by the protocol; their relative errors."""
    errors = {}
    for shape in ((5, 7), (32, 64), (3, 1), (1, 2)):
        layer = nn.Linear(shape[1], shape[0])
        a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        truth = row_norm(find_weight(layer), a, b, 0.7)
        whole_key = find_weight(layer).key()
        partition(layer, "weight")
        partition(layer, "bias")
        found = find_weight(layer)
        assert isinstance(found, ShardedWeight) and found.key() != whole_key and not found.direct()
        assert torch.equal(found.dense(), weight) and torch.equal(found.bias, bias)
        errors[str(shape)] = ((row_norm(found, a, b, 0.7) - truth).abs() / truth).max().item()
        found.write(weight + 1)
        assert torch.equal(find_weight(layer).dense(), weight + 1)
        layer.weight.data, layer.weight.ds_status = weight, Status.AVAILABLE
        assert not isinstance(find_weight(layer), ShardedWeight)
    return errors


def test_the_protocol_of_zero3_partitions_without_deepspeed(two):
    for errors in two.run(partitioned_layers):
        for shape, error in errors.items():
            assert error < 1e-6, shape


@pytest.mark.works_with("DeepSpeed", "the same through NCCL")
@pytest.mark.gpu
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_through_nccl(gpus, stage):
    truth = train(adapted())
    for run in gpus.run(zero, {"use_dora_triton": True}, stage):
        compare(run, truth, rtol=1e-4)
