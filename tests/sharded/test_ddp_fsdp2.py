# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA under DDP and FSDP2: what several ranks train together is what one process trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tiny import STEPS, Run, adapted, base_model, batches, checkpointed, compare, train, whole, worst
from torch import nn
from torch.distributed import is_initialized
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "dora": {},
    "triton": {"use_dora_triton": True},
    "lora": {"use_dora": False},
    "bias": {"bias": "lora_only"},
}


def device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def ddp(options: dict[str, Any], accumulate: int = 1) -> Run:
    model = adapted(base_model(device()), **options)
    wrapped = nn.parallel.DistributedDataParallel(model)
    world = torch.distributed.get_world_size()
    return train(wrapped, rank=torch.distributed.get_rank(), world=world, accumulate=accumulate)


def sharded(model: nn.Module, units: str, **settings: Any) -> nn.Module:
    """`fully_shard` in place: each block a unit, or each base layer and each adapter's module too."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device(), (torch.distributed.get_world_size(),))
    if units == "leaves":
        for module in model.modules():
            if hasattr(module, "base_layer"):
                for leaf in (module.base_layer, *module.lora_A.values(), *module.lora_B.values()):
                    fully_shard(leaf, mesh=mesh, **settings)
                for holder in module.lora_magnitude_vector.values():
                    fully_shard(holder, mesh=mesh, **settings)
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def fsdp2(
    options: dict[str, Any], units: str = "blocks", accumulate: int = 1, attention_bias: bool = False, **settings: Any
) -> Run:
    model = sharded(adapted(base_model(device(), attention_bias=attention_bias), **options), units, **settings)
    world = torch.distributed.get_world_size()
    return train(model, rank=torch.distributed.get_rank(), world=world, accumulate=accumulate)


def alone(options: dict[str, Any], accumulate: int = 1, attention_bias: bool = False) -> Run:
    model = adapted(base_model(attention_bias=attention_bias), **options)
    return train(model, accumulate=accumulate)


def policy(name: str) -> dict[str, Any]:
    """Settings of `fully_shard`: "plain", "mixed" precision, or parameters that are "offloaded" to the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    if name == "mixed":
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    # What the cpu lends the cpu needs no pinned memory.
    return {"offload_policy": CPUOffloadPolicy(pin_memory=device() == "cuda")} if name == "offloaded" else {}


def fsdp2_by(name: str, options: dict[str, Any], units: str) -> Run:
    return fsdp2(options, units, **policy(name))


def checkpointed_fsdp2(options: dict[str, Any], units: str = "blocks", use_reentrant: bool = False) -> Run:
    model = sharded(checkpointed(adapted(base_model(device()), **options), use_reentrant), units)
    return train(model, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())


def logits_around_writes(model: nn.Module, held: Iterable[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The logits as they are, after the base weights were doubled, and after every B was.

    Args:
        model: The model.
        held: What is to be written to, by name: what this process holds of each parameter.
    """
    held, logits = list(held), []
    with torch.no_grad():
        for touched in ("nothing", "base_layer", "lora_B"):
            for name, tensor in held:
                if touched in name:
                    tensor.mul_(2)
            logits.append(whole(model(input_ids=batches()[0].to(device() if is_initialized() else "cpu")).logits))
    return logits


def logits_around_writes_alone(base: nn.Module | None = None) -> list[torch.Tensor]:
    model = adapted(base)
    logits = logits_around_writes(model, model.named_parameters())
    assert all((after - before).abs().max() > 1e-2 for before, after in itertools.pairwise(logits))
    return logits


def logits_around_writes_to_shards(units: str) -> list[torch.Tensor]:
    model = sharded(adapted(base_model(device())), units)
    return logits_around_writes(model, shards_by_name(model))


def shards_by_name(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What this process holds of every parameter; a write to it leaves no trace, not even a version."""
    return [(name, value.data.to_local()) for name, value in model.named_parameters()]


def logits_before_and_after_writes(units: str, settings: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The last logits of `logits_around_writes`, and those of a model that was written to before its first pass."""
    used = sharded(adapted(base_model(device())), units, **policy(settings))
    fresh = sharded(adapted(base_model(device())), units, **policy(settings))
    last = logits_around_writes(used, shards_by_name(used))[-1]
    for name, tensor in shards_by_name(fresh):
        if "base_layer" in name or "lora_B" in name:
            tensor.mul_(2)
    return last, logits_around_writes(fresh, [])[0]


class Collectives(TorchDispatchMode):
    """Counts the entries that collectives bring together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "fsdp"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.sizes.append(max((tensor.numel() for tensor in tensors), default=0))
        return func(*args, **(kwargs or {}))


def traffic_of_a_norm(placements: str) -> tuple[list[int], float]:
    """The sizes of the collectives behind one norm of a weight in shards, and the norm's relative error."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = adapted(base_model(device()))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    truth = layer.dora_norm("default").clone()
    world = torch.distributed.get_world_size()
    meshes = {"rows": (world,), "columns": (world,), "both": (2, world // 2), "half": (2, world // 2)}
    split = {"rows": [Shard(0)], "columns": [Shard(1)], "both": [Shard(1), Shard(0)], "half": [Replicate(), Shard(1)]}
    mesh = init_device_mesh(device(), meshes[placements])
    base = layer.base_layer
    base.weight = torch.nn.Parameter(distribute_tensor(base.weight.data, mesh, split[placements]), requires_grad=False)
    with Collectives() as seen:
        norm = layer.dora_norm("default")
    assert torch.equal(layer.norm_weight().dense(), whole(base.weight).to(device()))
    assert torch.equal(layer.norm_weight().rows(3, 29), whole(base.weight)[3:29].to(device()))
    return seen.sizes, ((norm - truth).abs() / truth).max().item()


def traffic_of_a_pass(options: dict[str, Any], units: str, settings: str) -> list[int]:
    """The sizes of the collectives of one forward and backward pass under FSDP2."""
    model = sharded(adapted(base_model(device()), **options), units, **policy(settings))
    ids = batches()[0].to(device())
    with Collectives() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    return seen.sizes


def norms_of_a_run(job: str, accumulate: int) -> int:
    """How many norms a run computes."""
    import peft.dora.factors as factors

    body, computed = factors.row_norm_torch, []

    def counted(*args: Any) -> torch.Tensor:
        computed.append(args)
        return body(*args)

    factors.row_norm_torch = counted
    try:
        {"ddp": ddp, "fsdp2": fsdp2}[job]({}, accumulate=accumulate)
    finally:
        factors.row_norm_torch = body
    return len(computed)


def after_sharding() -> dict[str, torch.Tensor]:
    """The magnitudes of an adapter that is added to a model whose base layers are in shards."""
    model = adapted(base_model(device()))
    for module in model.modules():
        if hasattr(module, "base_layer"):
            sharded_alone(module.base_layer)
    torch.manual_seed(1)
    model.add_adapter("late", model.peft_config["default"])
    return {name: whole(value) for name, value in model.named_parameters() if "magnitude" in name and "late" in name}


def sharded_alone(module: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh(device(), (torch.distributed.get_world_size(),)))


def refusal() -> str:
    base = base_model(device(), attention_bias=True)
    model = sharded(adapted(base, bias="lora_only"), "leaves")
    ids = batches()[0].to(device())
    with pytest.raises(ValueError, match="shard unit of its own") as caught:
        model(input_ids=ids, labels=ids)
    return str(caught.value)


@pytest.mark.works_with("torch", "DDP")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:use_dora_triton")
def test_ddp_trains_what_one_process_trains(two, kind):
    truth = alone(KINDS[kind])
    for run in two.run(ddp, KINDS[kind]):
        compare(run, truth)


@pytest.mark.works_with("torch", "FSDP2")
@pytest.mark.parametrize("units", ["blocks", "leaves"])
@pytest.mark.parametrize("kind", ["triton", "lora"])
@pytest.mark.filterwarnings("ignore:use_dora_triton")
def test_fsdp2_trains_what_one_process_trains(two, kind, units):
    truth = alone(KINDS[kind])
    for run in two.run(fsdp2, KINDS[kind], units):
        compare(run, truth)


@pytest.mark.parametrize(
    ("job", "units"), [(ddp, ()), (fsdp2, ("blocks",)), (fsdp2, ("leaves",))], ids=["ddp", "blocks", "leaves"]
)
def test_four_ranks_train_what_one_process_trains(four, job, units):
    for run in four.run(job, KINDS["dora"], *units):
        compare(run, alone(KINDS["dora"]))


@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_base_biases_are_trained_and_composed(two, units):
    kind = {"bias": "none" if units == "leaves" else "lora_only"}
    truth = alone(kind, attention_bias=True)
    for run in two.run(fsdp2, kind, units, attention_bias=True):
        compare(run, truth)
    if units == "leaves":
        assert all("bias='none'" in message for message in two.run(refusal))


@pytest.mark.parametrize("job", [ddp, fsdp2])
def test_accumulated_gradients_are_the_same(two, job):
    truth = alone({}, accumulate=3)
    for run in two.run(job, {}, accumulate=3):
        compare(run, truth)


@pytest.mark.works_with("torch", "FSDP2 with checkpointing of both kinds")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_checkpointing_under_fsdp2(two, units, use_reentrant):
    truth = alone({})
    for run in two.run(checkpointed_fsdp2, {}, units, use_reentrant):
        compare(run, truth)


@pytest.mark.works_with("torch", "FSDP2 with CPU offload")
@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_fsdp2_with_its_parameters_on_the_cpu(two, units):
    for run in two.run(fsdp2_by, "offloaded", {}, units):
        compare(run, alone({}))


@pytest.mark.works_with("torch", "FSDP2 in mixed precision")
@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_fsdp2_in_mixed_precision(two, units):
    """DoRA loses no more by bfloat16 than twice what LoRA loses."""
    errors = {}
    for kind in ("dora", "lora"):
        truth = alone(KINDS[kind])
        errors[kind] = [worst(run, truth) for run in two.run(fsdp2_by, "mixed", KINDS[kind], units)]
    assert max(errors["dora"]) <= 2 * max(errors["lora"])


@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_a_write_to_the_shards_is_seen_by_the_next_pass(two, units):
    truth = logits_around_writes_alone()
    for logits in two.run(logits_around_writes_to_shards, units):
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", ["mixed", "offloaded"])
@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_a_write_is_seen_in_mixed_precision_and_when_offloaded(two, units, settings):
    for used, fresh in two.run(logits_before_and_after_writes, units, settings):
        assert torch.equal(used, fresh)


@pytest.mark.parametrize("placements", ["rows", "columns", "both", "half"])
def test_no_weight_is_gathered_for_its_norm(four, placements):
    out, features = 32, 64
    for sizes, error in four.run(traffic_of_a_norm, placements):
        assert sizes and max(sizes) <= out < out * features, f"collectives of {sizes} entries"
        assert error < 1e-6


@pytest.mark.parametrize("settings", ["plain", "mixed", "offloaded"])
@pytest.mark.parametrize("units", ["blocks", "leaves"])
def test_a_pass_gathers_what_it_gathers_for_lora(two, units, settings):
    """DoRA brings magnitudes along, and where a base layer is a unit, two vectors a norm; never a weight more."""
    magnitudes, layers, smallest = 256, 2 * 7, 16 * 32  # entries of a block's, base layers, entries of their weights
    lora = two.run(traffic_of_a_pass, {"use_dora": False}, units, settings)[0]
    for dora in two.run(traffic_of_a_pass, {}, units, settings):
        if units == "blocks":
            assert all(0 <= more - size <= magnitudes for more, size in zip(dora, lora, strict=True))
        else:
            assert sum(size >= smallest for size in dora) == sum(size >= smallest for size in lora) > layers


def test_norms_are_computed_when_something_changed(two):
    layers, steps = 2 * 7, STEPS + 1  # and the pass after the last step
    assert two.run(norms_of_a_run, "ddp", 3) == [layers * steps] * 2
    # A weight that is gathered for each pass may have been written to in its shards.
    assert two.run(norms_of_a_run, "fsdp2", 3) == [layers * (3 * STEPS + 1)] * 2


def test_an_adapter_added_to_shards_starts_at_their_norm(two):
    truth = adapted()
    torch.manual_seed(1)
    truth.add_adapter("late", truth.peft_config["default"])
    expected = {name: value for name, value in truth.named_parameters() if "magnitude" in name and "late" in name}
    for found in two.run(after_sharding):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].detach(), rtol=1e-6, atol=0)


@pytest.mark.works_with("torch", "DDP and FSDP2 through NCCL")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_ddp_and_fsdp2_through_nccl(gpus, kind):
    truth = alone(KINDS[kind])
    for job in (ddp, fsdp2, checkpointed_fsdp2):
        for run in gpus.run(job, KINDS[kind]):
            compare(run, truth, rtol=1e-4)
    for run in gpus.run(fsdp2, KINDS[kind], "leaves"):
        compare(run, truth, rtol=1e-4)
