# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA under FSDP2 as accelerate prepares it, saves it and reads it again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_state_dicts import blank, changed, logits
from tiny import Run, adapted, base_model, compare, train, trained

from peft import PeftModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@contextlib.contextmanager
def accelerator(**settings: Any) -> Iterator[Any]:
    """accelerate's FSDP2 with a decoder layer a unit, on the CPU, where it would fall back to DDP."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    layers = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    given = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False, **layers, **settings}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, **given)
    made = Accelerator(cpu=True)
    made.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    try:
        yield made
    finally:
        os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()  # the ranks serve other tests too


def prepared(made: Any, model: PeftModel) -> PeftModel:
    """The model in accelerate's hands, all of it in shards; they are prepared with their optimizer or not at all."""
    model, _ = made.prepare(model, torch.optim.SGD([parameter for _, parameter in trained(model)], lr=0.1))
    assert all(hasattr(parameter, "placements") for parameter in model.parameters())
    return model


def fit(folder: str, options: dict[str, Any], **settings: Any) -> Run:
    with accelerator(**settings) as made:
        model = prepared(made, adapted(base_model(), **options))
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        run = train(model, rank=rank, world=world)
        state = made.get_state_dict(model)
        made.unwrap_model(model).save_pretrained(folder, state_dict=state, is_main_process=rank == 0)
        torch.distributed.barrier()
        return run


def save_and_load(folder: str) -> torch.Tensor:
    """The logits of a model whose adapter was lost after accelerate's checkpoint of it, and read again."""
    from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model

    with accelerator() as made:
        model = changed(prepared(made, adapted(base_model())))
        plugin = made.state.fsdp_plugin
        save_fsdp_model(plugin, made, model, folder, adapter_only=True)  # as Trainer does
        blank(model)
        torch.distributed.barrier()
        load_fsdp_model(plugin, made, model, folder, adapter_only=True)
        return logits(model)


@pytest.mark.works_with("accelerate", "`prepare` under FSDP2")
@pytest.mark.parametrize("efficient", [False, True], ids=["plain", "cpu_ram_efficient_loading"])
@pytest.mark.parametrize("options", [{}, {"use_dora": False}], ids=["dora", "lora"])
def test_what_accelerate_prepares_trains_as_one_process(two, options, efficient, tmp_path):
    truth = train(adapted(**options))
    for run in two.run(fit, str(tmp_path), options, cpu_ram_efficient_loading=efficient):
        compare(run, truth)
    loaded = dict(PeftModel.from_pretrained(base_model(), tmp_path).named_parameters())
    for name, value in truth.parameters.items():
        torch.testing.assert_close(loaded[name].detach(), value)


@pytest.mark.works_with("accelerate", "sharded checkpoints of the adapter under FSDP2")
def test_a_checkpoint_of_the_adapter(four, tmp_path):
    truth = logits(changed(adapted()))
    for found in four.run(save_and_load, str(tmp_path)):
        torch.testing.assert_close(found, truth)
