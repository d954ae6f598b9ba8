# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters between one process and several: gathered and saved, loaded and split again, in every direction."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import RankError
from test_ddp_fsdp2 import device, policy, sharded
from test_fsdp1 import PACKED, base, wrapped
from test_tensor_parallel import model_of, split
from tiny import Run, adapted, base_model, batches, compare, train, trained, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.distributed is disabled")
ADAPTER_ONLY = StateDictOptions(ignore_frozen_params=True)
FULL = StateDictOptions(ignore_frozen_params=True, full_state_dict=True)


def changed(model: nn.Module) -> nn.Module:
    """The model after something happened to every trained parameter, the same in each process."""
    with torch.no_grad():
        for _, parameter in trained(model):
            parameter.mul_(1.5)
    return model


def blank(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _, parameter in trained(model):
            parameter.zero_()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return whole(
            model(input_ids=batches()[0].to(device() if torch.distributed.is_initialized() else "cpu")).logits
        )


def one_process(quantised: dict | None = None, place: str = "cpu") -> nn.Module:
    """The base that one process has, packed where there are settings for it."""
    return base_model(str(place)) if quantised is None else base(quantised, place)


def is_first() -> bool:
    return torch.distributed.get_rank() == 0


# ---- several ranks save --------------------------------------------------------------------------------------------
def save_fsdp2(folder: str, units: str, settings: str = "plain") -> None:
    model = changed(sharded(adapted(base_model(device())), units, **policy(settings)))
    model.save_pretrained(folder, is_main_process=is_first())
    torch.distributed.barrier()


def save_packed_fsdp2(folder: str) -> None:
    model = changed(sharded(adapted(base(PACKED["nf4"], device())), "leaves"))
    model.save_pretrained(folder, is_main_process=is_first())
    torch.distributed.barrier()


def save_tensor_parallel(folder: str) -> None:
    model = changed(split(adapted(model_of("dora"))).to(device()))
    model.save_pretrained(folder, is_main_process=is_first())
    torch.distributed.barrier()


def save_fsdp1(folder: str, use_orig_params: bool, quantised: dict | None = None) -> None:
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    outer = wrapped(changed(adapted(one_process(quantised, device()))), use_orig_params, "policy")
    with FSDP.state_dict_type(outer, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)):
        state = outer.state_dict()
    outer.module.save_pretrained(folder, state_dict=state, is_main_process=is_first())
    torch.distributed.barrier()


def save_by_accelerate(folder: str) -> None:
    """As a script does it: `prepare`, and the unwrapped model's save with accelerate's state dict."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device() == "cpu")
    model = accelerator.prepare(changed(adapted(base_model(device()))))
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        folder, state_dict=state, is_main_process=accelerator.is_main_process
    )
    accelerator.wait_for_everyone()


# the job, its arguments, and the base of one process
SAVERS = {
    "fsdp2": (save_fsdp2, ("blocks",), one_process),
    "fsdp2_leaves": (save_fsdp2, ("leaves",), one_process),
    "fsdp2_mixed": (save_fsdp2, ("blocks", "mixed"), one_process),
    "fsdp2_offloaded": (save_fsdp2, ("blocks", "offloaded"), one_process),
    "fsdp2_packed": (save_packed_fsdp2, (), partial(one_process, PACKED["nf4"])),
    "fsdp1": (save_fsdp1, (True,), one_process),
    "fsdp1_flat": (save_fsdp1, (False,), one_process),
    "fsdp1_packed": (save_fsdp1, (False, PACKED["nf4"]), partial(one_process, PACKED["nf4"])),
    "tensor_parallel": (save_tensor_parallel, (), partial(model_of, "dora")),
    "ddp_by_accelerate": (save_by_accelerate, (), one_process),
}


@pytest.mark.works_with("torch", "adapters saved by four ranks, loaded by one")
@pytest.mark.parametrize("saver", SAVERS)
def test_what_four_ranks_save_one_process_loads(four, saver, tmp_path):
    job, arguments, make = SAVERS[saver]
    four.run(job, str(tmp_path), *arguments)
    truth = changed(adapted(make()))
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    expected = get_peft_model_state_dict(truth)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    torch.testing.assert_close(logits(loaded), logits(truth))


# ---- several ranks load --------------------------------------------------------------------------------------------
def load_fsdp2(
    folder: str, units: str, when: str, settings: str = "plain", quantised: dict | None = None
) -> torch.Tensor:
    """The logits of a model that reads a saved adapter before it is sharded, or into its shards."""
    if when == "before":
        model = PeftModel.from_pretrained(one_process(quantised, device()), folder, is_trainable=True)
        return logits(sharded(model, units, **policy(settings)))
    model = blank(sharded(adapted(one_process(quantised, device())), units, **policy(settings)))
    result = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    assert not result.missing_keys and not result.unexpected_keys
    assert all(hasattr(parameter, "placements") for _, parameter in trained(model))
    return logits(model)


def load_tensor_parallel(folder: str, when: str) -> torch.Tensor:
    """The logits of a model whose base is split: before the adapter is read, or once it has one that is read into."""
    if when == "before":
        return logits(PeftModel.from_pretrained(split(model_of("dora")), folder).to(device()))
    model = blank(split(adapted(model_of("dora"))).to(device()))
    set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    return logits(model)


def load_fsdp1(folder: str, use_orig_params: bool, quantised: dict | None = None) -> torch.Tensor:
    """The logits of a model of flat parameters that a saved adapter was read into."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    outer = wrapped(blank(adapted(one_process(quantised, device()))), use_orig_params, "policy")
    with FSDP.summon_full_params(outer):
        result = set_peft_model_state_dict(outer.module, load_peft_weights(folder, device="cpu"))
    assert not result.missing_keys and not result.unexpected_keys
    return logits(outer)


def load_second(folder: str) -> torch.Tensor:
    """The logits of a second adapter, loaded into a model whose base is in shards."""
    model = sharded(adapted(base_model(device())), "leaves")
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return logits(model)


@pytest.mark.works_with("torch", "adapters saved by one, loaded by four ranks")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("units", ["blocks", "leaves"])
@pytest.mark.parametrize("quantised", [None, PACKED["nf4"]], ids=["plain", "nf4"])
def test_what_one_process_saves_four_ranks_load(four, quantised, units, when, tmp_path):
    truth = changed(adapted(one_process(quantised)))
    truth.save_pretrained(tmp_path)
    for found in four.run(load_fsdp2, str(tmp_path), units, when, "plain", quantised):
        torch.testing.assert_close(found, logits(truth))


@pytest.mark.parametrize("settings", ["mixed", "offloaded"])
def test_four_ranks_load_in_mixed_precision_and_when_offloaded(four, settings, tmp_path):
    truth = changed(adapted())
    truth.save_pretrained(tmp_path)
    close = {"rtol": 0, "atol": 0.01} if settings == "mixed" else {}
    for found in four.run(load_fsdp2, str(tmp_path), "blocks", "after", settings):
        torch.testing.assert_close(found, logits(truth), **close)


@pytest.mark.parametrize("quantised", [None, PACKED["nf4"]], ids=["plain", "nf4"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_an_adapter_is_loaded_into_flat_parameters(four, use_orig_params, quantised, tmp_path):
    truth = changed(adapted(one_process(quantised)))
    truth.save_pretrained(tmp_path)
    for found in four.run(load_fsdp1, str(tmp_path), use_orig_params, quantised):
        torch.testing.assert_close(found, logits(truth))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_is_loaded_beside_a_split_base(four, when, tmp_path):
    truth = changed(adapted(model_of("dora")))
    truth.save_pretrained(tmp_path)
    for found in four.run(load_tensor_parallel, str(tmp_path), when):
        torch.testing.assert_close(found, logits(truth))


def test_a_second_adapter_is_loaded_beside_shards(two, tmp_path):
    truth = changed(adapted())
    truth.save_pretrained(tmp_path)
    for found in two.run(load_second, str(tmp_path)):
        torch.testing.assert_close(found, logits(truth))


# ---- torch.distributed.checkpoint ----------------------------------------------------------------------------------
def checkpoint(folder: str) -> None:
    model = changed(sharded(adapted(base_model(device())), "blocks"))
    dcp.save(get_model_state_dict(model, options=ADAPTER_ONLY), checkpoint_id=folder)


def resumed(folder: str) -> nn.Module:
    model = blank(sharded(adapted(base_model(device())), "blocks"))
    state = get_model_state_dict(model, options=ADAPTER_ONLY)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    return model


def resume(folder: str) -> torch.Tensor:
    return logits(resumed(folder))


def train_on(folder: str) -> Run:
    return train(resumed(folder), rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())


def alone(folder: str, action: str) -> torch.Tensor:
    """The same by a process without a group."""
    model = changed(adapted()) if action == "save" else blank(adapted())
    state = {name: parameter.data for name, parameter in trained(model)}
    if action == "save":
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    else:
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return logits(model)


@pytest.mark.works_with("torch", "distributed checkpoints")
@pytest.mark.parametrize("writer", ["one", "two", "four"])
def test_a_distributed_checkpoint_is_read_by_any_number_of_ranks(two, four, writer, tmp_path):
    folder = str(tmp_path / "step")
    if writer == "one":
        alone(folder, "save")
    else:
        {"two": two, "four": four}[writer].run(checkpoint, folder)
    truth = logits(changed(adapted()))
    for found in (*two.run(resume, folder), *four.run(resume, folder), alone(folder, "load")):
        torch.testing.assert_close(found, truth)


def killed_in_a_shard(folder: str) -> None:
    """The second rank is killed when it has written half of its part of the second checkpoint."""
    checkpoint(f"{folder}/step-1")
    if not is_first():

        def kill(descriptor: int) -> None:
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = kill
    model = sharded(adapted(base_model(device())), "blocks")
    dcp.save(get_model_state_dict(model, options=ADAPTER_ONLY), checkpoint_id=f"{folder}/step-2")


@pytest.mark.works_with("torch", "distributed checkpoints, a rank killed while it wrote its shard")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_the_checkpoint_before_a_killed_rank_loads_and_trains_on(two, tmp_path):
    with pytest.raises(RankError, match="killed_in_a_shard"):  # the other rank says so, or nobody does
        two.run(killed_in_a_shard, str(tmp_path))
    assert list((tmp_path / "step-2").glob("*.distcp")) and not (tmp_path / "step-2" / ".metadata").exists()
    truth = changed(adapted())
    for found in (*two.run(resume, str(tmp_path / "step-1")), alone(str(tmp_path / "step-1"), "load")):
        torch.testing.assert_close(found, logits(truth))
    expected = train(truth)
    for run in two.run(train_on, str(tmp_path / "step-1")):
        compare(run, expected)


def full_from_shards() -> dict[str, torch.Tensor]:
    model = changed(sharded(adapted(base_model(device())), "blocks"))
    return get_peft_model_state_dict(model, state_dict=get_model_state_dict(model, options=FULL))


def test_a_gathered_state_dict_is_an_adapters(two):
    truth = get_peft_model_state_dict(changed(adapted()))
    first, *others = two.run(full_from_shards)
    assert first.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(first[name].cpu(), value), name
    assert all(not other or other.keys() == truth.keys() for other in others)


@pytest.mark.gpu
def test_adapters_cross_from_and_to_gpus(gpus, tmp_path):
    gpus.run(save_fsdp2, str(tmp_path), "blocks")
    truth = changed(adapted())
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(truth))
    for found in gpus.run(load_fsdp2, str(tmp_path), "blocks", "after"):
        torch.testing.assert_close(found, logits(truth), rtol=1e-4, atol=1e-4)
