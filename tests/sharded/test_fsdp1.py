# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA under FSDP's first version, with its flat parameters, and QDoRA with packed weights among them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_ddp_fsdp2 import Collectives, logits_around_writes, logits_around_writes_alone, sharded, shards_by_name
from tiny import Run, adapted, base_model, batches, checkpointed, compare, gradients_of, parameters_of, train, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import Shard, distribute_tensor

from peft.dora import row_norm
from peft.utils.other import fsdp_auto_wrap_policy
from peft.weights import find_weight
from peft.weights.bnb import ShardedWeight4bit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:use_dora_triton")


def device() -> torch.device:
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def leaves_policy() -> Any:
    """Every module that holds parameters itself is a unit, base layers among them."""
    return partial(
        lambda_auto_wrap_policy, lambda_fn=lambda module: any(True for _ in module.parameters(recurse=False))
    )


def wrapped(model: nn.Module, use_orig_params: bool, units: str, **settings: Any) -> nn.Module:
    policy = fsdp_auto_wrap_policy(model) if units == "policy" else leaves_policy()
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=device(), **settings)


def gradients_of_flat(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of flat parameters that hold one parameter each."""
    found = {}
    for name, module in model.named_modules():
        handle = module._handle if isinstance(module, FSDP) else None
        if handle is None or not handle.flat_param.requires_grad:
            continue
        flat = handle.flat_param
        shards = [torch.empty_like(flat.grad) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shards, flat.grad)
        entries = torch.cat(shards)[: flat._shapes[0].numel()]
        found[f"{name}.{flat._param_infos[0].param_name}"] = entries.view(flat._shapes[0]).cpu()
    return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in found.items()}


def gradients_of_original(model: nn.Module) -> dict[str, torch.Tensor]:
    with FSDP.summon_full_params(model, writeback=False, with_grads=True):
        return gradients_of(model)


def parameters_whole(model: nn.Module) -> dict[str, torch.Tensor]:
    with FSDP.summon_full_params(model, writeback=False):
        return parameters_of(model)


def fsdp1(
    options: dict[str, Any],
    use_orig_params: bool,
    units: str = "policy",
    quantised: dict | None = None,
    use_reentrant: bool | None = None,
    **settings: Any,
) -> Run:
    model = adapted(base(quantised, device()), **options)
    if use_reentrant is not None:
        checkpointed(model, use_reentrant)
    outer = wrapped(model, use_orig_params, units, **settings)
    gradients = gradients_of_original if use_orig_params else gradients_of_flat
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return train(outer, rank=rank, world=world, gradients=gradients, parameters=parameters_whole)


def mixed(options: dict[str, Any], use_orig_params: bool, units: str) -> Run:
    """As accelerate does it: shards gathered in bfloat16, and autocast."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.autocast(device().type, torch.bfloat16):
        return fsdp1(options, use_orig_params, units, mixed_precision=precision)


def spread(options: dict[str, Any], units: str, quantised: dict | None) -> nn.Module:
    """An adapted model in FSDP: in its first version, or for units named "fsdp2 …" in its second."""
    model = adapted(base(quantised, device()), **options)
    return sharded(model, units.split()[1]) if units.startswith("fsdp2 ") else wrapped(model, True, units)


def shards_held(outer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return flat_shards(outer) if isinstance(outer, FSDP) else shards_by_name(outer)


def large_collectives(options: dict[str, Any], units: str, smallest: int, quantised: dict | None = None) -> int:
    """How many collectives of one forward and backward pass bring at least so many entries together."""
    outer = spread(options, units, quantised)
    ids = batches()[0].to(device())
    with Collectives() as seen:
        outer(input_ids=ids, labels=ids).loss.backward()
    return sum(size >= smallest for size in seen.sizes)


def flat_shards(outer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What this process holds of every parameter, by name, also where several make one flat parameter."""
    found = []
    for name, module in outer.named_modules():
        handle = module._handle if isinstance(module, FSDP) else None
        if handle is None:
            continue
        flat = handle.flat_param
        for info, shard in zip(flat._param_infos, flat._shard_param_infos, strict=True):
            if shard.in_shard:
                start = shard.offset_in_shard
                held = getattr(flat, "_local_shard", flat.data)[start : start + shard.numel_in_shard]
                found.append((f"{name}.{info.module_name}.{info.param_name}", held))
    return found


def logits_around_writes_to_flat_shards(units: str) -> list[torch.Tensor]:
    outer = wrapped(adapted(base_model(str(device()))), True, units)
    return logits_around_writes(outer, flat_shards(outer))


def packed_logits(units: str, write: str) -> torch.Tensor:
    """The logits of a packed model; "before" or "after" a pass all stored bytes are inverted and all B doubled."""
    outer = spread({}, units, PACKED["nf4"])
    held = shards_held(outer)
    ids = batches()[0].to(device())
    with torch.no_grad():
        if write == "after":
            outer(input_ids=ids)
        for name, shard in held if write != "never" else ():
            if "base_layer" in name:
                inverted = shard.view(torch.uint8).bitwise_not()
                shard.view(torch.uint8).copy_(inverted)
            elif "lora_B" in name:
                shard.mul_(2)
        return outer(input_ids=ids).logits.cpu()


def base(quantised: dict | None, device: torch.device) -> nn.Module:
    """The base model; with settings for it, its linear layers in bitsandbytes' four bits."""
    storage = (quantised or {}).get("storage", torch.float32)
    model = base_model(dtype=storage, hidden_size=64, intermediate_size=128)
    return (model if quantised is None else packed(model, **quantised)).to(device)


def packed(model: nn.Module, quant_type: str = "nf4", nested: bool = True, storage: Any = torch.float32) -> nn.Module:
    """Linear layers but the head become `Linear4bit`; what FSDP flattens together must have one dtype: `storage`."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
                compress_statistics=nested, quant_type=quant_type, quant_storage=storage,
            )  # fmt: skip
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to("cpu"))
    return model


def packed_fsdp2(quantised: dict, units: str) -> Run:
    model = sharded(adapted(base(quantised, device())), units)
    return train(model, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())


def norms_of_packed_shards() -> dict[str, float]:
    """The relative error of norms taken from shards of packed bytes."""
    errors = {}
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        for shape in ((14, 100), (7, 64), (3, 8), *[(3, 7)] * (storage == torch.uint8)):
            layer = bnb_layer(*shape, storage)
            plain = find_weight(layer)
            a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
            truth, dense = row_norm(plain, a, b, 0.7), plain.dense()
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            spread = distribute_tensor(layer.weight.data.as_subclass(torch.Tensor), mesh, [Shard(0)])
            layer.weight = nn.Parameter(spread, requires_grad=False)
            found = find_weight(layer)
            assert isinstance(found, ShardedWeight4bit) and torch.equal(found.dense(), dense)
            errors[f"{storage} {shape}"] = ((row_norm(found, a, b, 0.7) - truth).abs() / truth).max().item()
    return errors


def bnb_layer(out: int, features: int, storage: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(features, out, bias=False, quant_storage=storage)
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    return layer.to("cpu")


def refused_write() -> str:
    layer = bnb_layer(8, 64, torch.uint8)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    spread = distribute_tensor(layer.weight.data.as_subclass(torch.Tensor), mesh, [Shard(0)])
    layer.weight = nn.Parameter(spread, requires_grad=False)
    with pytest.raises(RuntimeError, match="4-bit weight in shards") as caught:
        find_weight(layer).write(torch.zeros(8, 64))
    return str(caught.value)


def alone(options: dict[str, Any], quantised: dict | None = None) -> Run:
    return train(adapted(base(quantised, torch.device("cpu")), **options))


@pytest.mark.works_with("torch", "FSDP1, its auto-wrap policy included")
@pytest.mark.parametrize("units", ["policy", "leaves"])
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": False}], ids=["dora", "lora"])
def test_fsdp1_trains_what_one_process_trains(two, options, use_orig_params, units):
    truth = alone(options)
    for run in two.run(fsdp1, options, use_orig_params, units):
        compare(run, truth)


@pytest.mark.works_with("torch", "FSDP1 in mixed precision")
@pytest.mark.parametrize("units", ["policy", "leaves"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_in_mixed_precision(two, use_orig_params, units):
    """DoRA loses no more by bfloat16 than twice what LoRA loses."""
    errors = {}
    for kind, options in (("dora", {}), ("lora", {"use_dora": False})):
        truth = alone(options)
        errors[kind] = [worst(run, truth) for run in two.run(mixed, options, use_orig_params, units)]
    assert max(errors["dora"]) <= 2 * max(errors["lora"])


@pytest.mark.parametrize("units", ["policy", "leaves"])
def test_a_write_to_flat_shards_is_seen_by_the_next_pass(two, units):
    truth = logits_around_writes_alone()
    for logits in two.run(logits_around_writes_to_flat_shards, units):
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-5)


PACKED = {
    "nf4": {},
    "plain": {"nested": False},
    "fp4": {"quant_type": "fp4"},
    "bf16": {"storage": torch.bfloat16},
}


PACKED_UNITS = ["policy", "leaves", "fsdp2 blocks", "fsdp2 leaves"]


@pytest.mark.parametrize("units", PACKED_UNITS)
@pytest.mark.parametrize("quantised", [None, PACKED["nf4"]], ids=["plain", "nf4"])
def test_a_pass_gathers_no_weight_more_than_for_lora(two, quantised, units):
    smallest = 32 * 64 // (1 if quantised is None else 8)  # half a key's weight: what one of two ranks holds of it
    lora = two.run(large_collectives, {"use_dora": False}, units, smallest, quantised)
    assert two.run(large_collectives, {}, units, smallest, quantised) == lora and min(lora) > 0


@pytest.mark.parametrize("units", PACKED_UNITS)
def test_a_write_to_packed_shards_is_seen_by_the_next_pass(two, units):
    results = zip(*(two.run(packed_logits, units, write) for write in ("never", "before", "after")), strict=True)
    for never, before, after in results:
        assert (before - never).abs().max() > 1e-2 and torch.equal(after, before)


@pytest.mark.parametrize("quantised", [None, PACKED["nf4"]], ids=["plain", "nf4"])
def test_flat_shards_on_four_ranks_split_rows(four, quantised):
    for run in four.run(fsdp1, {}, True, "leaves", quantised):
        compare(run, alone({}, quantised))


@pytest.mark.works_with("torch", "FSDP1 with checkpointing of both kinds")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("quantised", [None, PACKED["nf4"]], ids=["plain", "nf4"])
def test_checkpointing_under_fsdp1(two, quantised, use_reentrant):
    truth = alone({}, quantised)
    for run in two.run(fsdp1, {}, True, "policy", quantised, use_reentrant):
        compare(run, truth)


@pytest.mark.parametrize("units", ["policy", "leaves"])
def test_parameters_that_stay_whole_until_the_backward_pass(two, units):
    truth = alone({})
    for run in two.run(fsdp1, {}, True, units, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP):
        compare(run, truth)


@pytest.mark.works_with("bitsandbytes", "QDoRA under FSDP1 with `bnb_4bit_quant_storage`")
@pytest.mark.parametrize("units", ["policy", "leaves"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_qdora_with_packed_weights_in_flat_parameters(two, use_orig_params, units):
    truth = alone({}, PACKED["nf4"])
    for run in two.run(fsdp1, {}, use_orig_params, units, PACKED["nf4"]):
        compare(run, truth)


@pytest.mark.parametrize("kind", ["plain", "fp4"])
def test_other_four_bit_formats_in_shards(two, kind):
    truth = alone({}, PACKED[kind])
    for run in two.run(fsdp1, {}, True, "leaves", PACKED[kind]):
        compare(run, truth)


@pytest.mark.parametrize("units", ["policy", "leaves"])
def test_packed_bytes_are_stored_as_bfloat16(two, units):
    """As Trainer sets it up: `bnb_4bit_quant_storage` is the dtype of everything else that is flattened with it."""
    truth = alone({}, PACKED["bf16"])
    for run in two.run(fsdp1, {}, False, units, PACKED["bf16"]):
        compare(run, truth, rtol=2e-3)


@pytest.mark.works_with("bitsandbytes", "QDoRA under FSDP2")
@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_qdora_under_fsdp2(two, units):
    truth = alone({}, PACKED["nf4"])
    for run in two.run(packed_fsdp2, PACKED["nf4"], units):
        compare(run, truth)


def test_norms_of_packed_shards(four):
    """Every storage dtype; shards that end inside a block, a row and a byte's pair."""
    for results in four.run(norms_of_packed_shards):
        for what, error in results.items():
            assert error < 1e-6, what


def test_a_packed_weight_in_shards_is_not_written(two):
    for message in two.run(refused_write):
        assert "summon_full_params" in message


@pytest.mark.works_with("torch", "FSDP1 and QDoRA through NCCL")
@pytest.mark.gpu
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_and_qdora_through_nccl(gpus, use_orig_params):
    for quantised in (None, PACKED["nf4"]):
        truth = alone({}, quantised)
        for run in gpus.run(fsdp1, {"use_dora_triton": True}, use_orig_params, "policy", quantised):
            compare(run, truth, rtol=1e-4)
