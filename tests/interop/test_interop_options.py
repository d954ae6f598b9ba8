# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Every option of `LoraConfig` on both sides: what an adapter starts as, computes and saves, and that it loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import option_recipes
import pytest
import recipes
import torch
from compare import DEEP, assert_equal, assert_equal_grads, saved_facts
from models import CASES
from options import BASES, NO_NF4, OPTIONS, Option
from peer import Peer, PeerError

import peft
from peft.tuners.lora import LoraLayer

pytestmark = pytest.mark.interop


def _names(*, refused: bool, bases: Container[str] = tuple(BASES)) -> list[Any]:
    """The options on some bases as parameters of a test, skipped without the package that they need."""
    return [
        pytest.param(
            name,
            id=name,
            marks=[
                pytest.mark.skipif(
                    option.package is not None and find_spec(option.package) is None,
                    reason=f"{option.package} is not installed",
                )
            ],
        )
        for name, option in OPTIONS.items()
        if (refused or not option.refused) and option.base in bases
    ]


every_option = pytest.mark.parametrize("name", _names(refused=True))
made_here = pytest.mark.parametrize("name", _names(refused=False))
STATES = ("y", "eval", "disabled", "merged", "unmerged", "unloaded")


def coarse(option: Option, state: str = "eval") -> torch.dtype:
    """On some CPUs bitsandbytes computes in bfloat16 where nothing is trained."""
    return torch.bfloat16 if option.quantised and state != "y" else torch.float32


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: [list(tensor.shape), tensor.dtype] for name, tensor in tensors.items()}


def adapter_alone(option: Option, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without base embeddings where upstream names other targets, by which it decides whether to save them."""
    if "target_modules" not in option.wrong:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}


def there(peer: Peer, option: Option, recipe: str, **arguments: Any) -> Any:
    """What upstream makes of it; None where it must refuse, and does, or where it leaves something out."""
    if option.less_there:
        return None
    refusal = option.there or ("RuntimeError" if recipe == "option_trained" and not option.trains_there else "")
    if not refusal:
        return peer.run(recipe, **arguments)
    with pytest.raises(PeerError) as raised:
        peer.run(recipe, **arguments)
    assert raised.value.kind in refusal.split("|"), raised.value
    return None


# Fields of the config that no row sets, and where they are tested.
ELSEWHERE = {
    "arrow_config": "test_interop_family.py",
    "megatron_config": "tests/lora/test_megatron_layers.py",
    "megatron_core": "tests/lora/test_megatron_layers.py",
    "runtime_config": "test_faults.py",
    "use_dora_triton": "tests/matrix, tests/dora; upstream has no such option",
    **dict.fromkeys(
        ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
        "test_interop_models.py, test_interop_files.py: they say what a file is of",
    ),
}


def test_every_field_of_the_config_has_a_row() -> None:
    cases = [option.config() for option in OPTIONS.values() if not option.refused]
    cases += [peft.LoraConfig(**case.options) for case in CASES.values()]
    plain = peft.LoraConfig()
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    set_somewhere = {name for name in fields for config in cases if getattr(config, name) != getattr(plain, name)}
    assert not set_somewhere & ELSEWHERE.keys() - {"peft_version"}
    assert set_somewhere | ELSEWHERE.keys() == fields


def test_every_row_has_one_on_nf4_where_the_base_has_such_a_form() -> None:
    held = {name for name, option in OPTIONS.items() if option.base not in NO_NF4}
    assert {name for name in held if not name.endswith("-nf4") and f"{name}-nf4" not in held} == set()
    assert NO_NF4.keys() <= BASES.keys()


@pytest.mark.parametrize("name", _names(refused=False, bases=NO_NF4))
def test_rows_without_one_on_nf4_adapt_what_bitsandbytes_does_not_hold(name: str) -> None:
    base = OPTIONS[name].base
    assert f"{base}-nf4" not in BASES
    model, _, _ = option_recipes._made(name)
    adapted = [type(m.get_base_layer()) for m in model.modules() if isinstance(m, LoraLayer)]
    assert any(layer is not torch.nn.Linear for layer in adapted), f"{NO_NF4[base]}, but {adapted}"


@every_option
def test_start(name: str, peer: Peer) -> None:
    option = OPTIONS[name]
    if option.refused:
        for run in (recipes.run,) if option.less_there else (recipes.run, peer.run):
            with pytest.raises((PeerError, TypeError, ValueError, RuntimeError)) as raised:
                run("option_started", name=name)
            assert getattr(raised.value, "kind", type(raised.value).__name__) in option.refused.split("|")
        return
    ours, theirs = recipes.run("option_started", name=name), there(peer, option, "option_started", name=name)
    assert torch.isfinite(ours["y"]).all()
    if option.less_there:
        assert shapes(ours["parameters"]) != shapes(peer.run("option_started", name=name)["parameters"])
    if theirs is None:
        return
    for part in {"layers", "ranks", "frozen", "counts"}.difference(option.wrong):
        assert_equal(ours[part], theirs[part], part)
    common = ours["parameters"].keys() & theirs["parameters"].keys() if "parameters" in option.wrong else None
    for side in (ours, theirs) if common is not None else ():
        side["parameters"] = {key: side["parameters"][key] for key in common}
    assert shapes(ours["parameters"]) == shapes(theirs["parameters"])
    assert_equal(ours["y"], theirs["y"], "output", loose=coarse(option), ulps=8 * DEEP)
    if option.drawn or "parameters" in option.wrong:
        return
    eps = torch.finfo(torch.float32).eps
    ulps, factor_ulps = max(DEEP, option.room / eps), max(DEEP, 100 * option.room / eps)
    sides = [side["parameters"] for side in (ours, theirs)]
    if option.signs:
        sides = [{key: tensor.abs() for key, tensor in side.items()} for side in sides]
    assert_equal(*sides, "parameters", ulps=factor_ulps)
    if "products" not in option.wrong:
        assert_equal(ours["products"], theirs["products"], "products", ulps=ulps, scale=1e-3)
    if not option.quantised:
        assert_equal(ours["base"], theirs["base"], "base", ulps=ulps)


@made_here
def test_training_merging_saving_loading(name: str, peer: Peer, tmp_path: Path) -> None:
    option = OPTIONS[name]
    here, there_ = str(tmp_path / "ours"), str(tmp_path / "theirs")
    ours = recipes.run("option_trained", name=name, folder=here)
    check_states(ours, option)
    check_loads(recipes.run, name, here, ours, ours, (False, True))
    theirs = there(peer, option, "option_trained", name=name, folder=there_)
    if theirs is None:
        return
    assert not option.merges or ("merged" in theirs) == option.merges_there
    check_results(ours, theirs, option)
    check_loads(recipes.run, name, there_, theirs, ours, (False,))
    check_loads(peer.run, name, here, ours, theirs, (False,))
    filled = {name.replace(".default", "") for name in ours["grads"]}
    for side in (ours, theirs):
        for name, tensors in side["saved"]["tensors"].items():
            own = adapter_alone(option, tensors)
            drawn = {} if not option.drawn else {key: shapes({"": own[key]})[""] for key in own.keys() - filled}
            side["saved"]["tensors"][name] = {**own, **{key: str(shape) for key, shape in drawn.items()}}
        for config in side["saved"]["configs"].values():
            for key in option.wrong:
                config.pop(key, None)
    assert_equal(saved_facts(ours["saved"]), saved_facts(theirs["saved"]), "saved", loose=coarse(option), ulps=DEEP)


def check_states(ours: dict[str, Any], option: Option) -> None:
    """Merging leaves our outputs as they are, as far as the format allows, and unmerging brings them back."""
    assert all(torch.isfinite(grad).all() for grad in ours["grads"].values())
    if not option.merges:
        return
    assert_equal(ours["unmerged"], ours["eval"], "unmerged", loose=coarse(option), ulps=4 * DEEP)
    assert_equal(ours["unloaded"], ours["merged"], "unloaded", loose=coarse(option), ulps=4 * DEEP)
    if not option.quantised:
        assert_equal(ours["merged"], ours["eval"], "merged", ulps=4 * DEEP)


def check_results(ours: dict[str, Any], theirs: dict[str, Any], option: Option) -> None:
    """Equal outputs in every state that upstream has right, equal gradients, and an equal addition to the loss."""
    assert "grads" in option.wrong or shapes(ours["grads"]) == shapes(theirs["grads"])
    assert ("loss" in theirs) == ("loss" in ours)
    if option.drawn:
        return
    ulps = max(DEEP, 10 * option.room / torch.finfo(torch.float32).eps)
    for state in STATES:
        # unmerging a quantised layer does not give its bytes back there
        skipped = option.quantised and state in ("unmerged", "unloaded")
        if state in theirs and state not in option.wrong and not skipped:
            assert_equal(ours[state], theirs[state], state, loose=coarse(option, state), ulps=ulps)
    if "grads" not in option.wrong:
        assert_equal_grads(ours["grads"], theirs["grads"], ulps=ulps)
    assert_equal(ours.get("loss"), theirs.get("loss"), "loss", ulps=ulps)


def check_loads(
    run: Callable[..., Any],
    name: str,
    folder: str,
    writer: dict[str, Any],
    reader: dict[str, Any],
    meta: tuple[bool, ...],
) -> None:
    """What was written is read whole, and gives the output that the reader has for these values."""
    option = OPTIONS[name]
    (tensors,) = writer["saved"]["tensors"].values()
    for low_cpu_mem_usage in meta:
        loaded = run("option_loaded", name=name, folder=folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_equal(adapter_alone(option, loaded["state"]), adapter_alone(option, tensors), "state")
        if not option.drawn and (option.low_cpu_mem or not low_cpu_mem_usage):
            assert_equal(loaded["y"], reader["eval"], "output", loose=coarse(option), ulps=4 * DEEP)
