# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA beside base layers that are split by columns and rows: torch's DTensor styles, and transformers' plan."""

from __future__ import annotations

import pytest
import torch
from test_ddp_fsdp2 import Collectives, device, logits_around_writes, logits_around_writes_alone
from tiny import TARGETS, Run, adapted, base_model, batches, checkpointed, compare, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from peft import get_peft_model_state_dict

OPTIONS = {
    "dora": {},
    "lora": {"use_dora": False},
    "lora_bias": {"use_dora": False, "lora_bias": True},
    "base_bias": {},
    "triton": {"use_dora_triton": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:use_dora_triton", "ignore:lora_bias=True")


def model_of(kind: str) -> nn.Module:
    # heads enough for four ranks
    return base_model(num_key_value_heads=4, attention_bias=kind == "base_bias", mlp_bias=kind == "base_bias")


def split(model: nn.Module) -> nn.Module:
    """Columns of the layers that read the residual stream, rows of those that write to it."""
    mesh = init_device_mesh(device(), (torch.distributed.get_world_size(),))
    for name, module in model.named_modules():
        leaf = name.removesuffix(".base_layer").rpartition(".")[2]
        if isinstance(module, nn.Linear) and leaf in TARGETS:
            style = RowwiseParallel() if leaf in ("o_proj", "down_proj") else ColwiseParallel()
            parallelize_module(module, mesh, style)
    return model


def tensor_parallel(kind: str, first: str, use_reentrant: bool | None = None) -> Run:
    """Every rank sees every row; the base is split before the adapter is made, or after."""
    base = model_of(kind)
    if first == "split":
        model = adapted(split(base), **OPTIONS[kind])
    else:
        model = split(adapted(base, **OPTIONS[kind]))
    if use_reentrant is not None:
        checkpointed(model, use_reentrant)
    return train(model.to(device()))


def norms(kind: str) -> dict[str, torch.Tensor]:
    model = split(adapted(model_of(kind)))
    return {name: layer.dora_norm("default") for name, layer in layers_of(model)}


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "dora_norm")]


def logits_around_writes_to_parts() -> list[torch.Tensor]:
    model = split(adapted(model_of("dora"))).to(device())
    held = ((name, value.data) for name, value in model.named_parameters())
    return logits_around_writes(model, [(name, getattr(value, "_local_tensor", value)) for name, value in held])


def large_collectives(kind: str) -> list[int]:
    """The sizes of a pass's collectives, those of vectors left out."""
    model = split(adapted(model_of(kind), **OPTIONS[kind])).to(device())
    ids = batches()[0].to(device())
    with Collectives() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    return sorted(size for size in seen.sizes if size > 64)


def by_plan(folder: str) -> tuple[Run, dict[str, torch.Tensor]]:
    """The model as `from_pretrained(tp_plan="auto")` splits it."""
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    assert any(hasattr(parameter, "placements") for parameter in base.parameters())
    model = adapted(base)
    return train(model), get_peft_model_state_dict(model)


@pytest.mark.works_with("torch", "tensor parallel by columns and by rows")
@pytest.mark.parametrize("first", ["split", "adapter"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_columns_and_rows_train_what_one_process_trains(two, kind, first):
    truth = train(adapted(model_of(kind), **OPTIONS[kind]))
    for run in two.run(tensor_parallel, kind, first):
        compare(run, truth)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_beside_a_split_base(two, use_reentrant):
    truth = train(adapted(model_of("dora")))
    for run in two.run(tensor_parallel, "dora", "split", use_reentrant):
        compare(run, truth)


def test_four_ranks(four):
    truth = train(adapted(model_of("dora")))
    for run in four.run(tensor_parallel, "dora", "split"):
        compare(run, truth)


def test_norms_are_those_of_the_whole_rows(two):
    truth = {name: layer.dora_norm("default") for name, layer in layers_of(adapted(model_of("dora")))}
    for found in two.run(norms, "dora"):
        assert found.keys() == truth.keys()
        for name, norm in found.items():
            torch.testing.assert_close(norm, truth[name], rtol=1e-6, atol=0)


def test_a_write_to_the_parts_is_seen_by_the_next_pass(two):
    truth = logits_around_writes_alone(model_of("dora"))
    for logits in two.run(logits_around_writes_to_parts):
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-5)


def test_a_pass_brings_together_what_it_does_for_lora(two):
    lora = two.run(large_collectives, "lora")
    assert two.run(large_collectives, "dora") == lora and all(lora)


@pytest.mark.works_with("transformers", "its plan of tensor parallelism")
def test_the_plan_of_transformers(two, tmp_path):
    model_of("dora").save_pretrained(tmp_path)
    model = adapted(model_of("dora"))
    truth = train(model)
    for run, state in two.run(by_plan, str(tmp_path)):
        compare(run, truth)
        for name, value in get_peft_model_state_dict(model).items():
            assert state[name].shape == value.shape, name


def test_a_split_that_is_not_known_is_refused():
    layer = adapted(model_of("dora")).get_base_model().model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="ColwiseParallel or RowwiseParallel"):
        layer.split(torch.zeros(1, 16), torch.zeros(1, 32))


@pytest.mark.works_with("torch", "tensor parallel through NCCL")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPTIONS)
def test_tensor_parallel_through_nccl(gpus, kind):
    truth = train(adapted(model_of(kind), **OPTIONS[kind]))
    for run in gpus.run(tensor_parallel, kind, "adapter"):
        compare(run, truth, rtol=1e-4)
