# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MonteCLoRA, Arrow and X-LoRA against upstream's release: numbers, gradients, files, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipes
import recipes_family  # noqa: F401  registers its recipes
import recipes_xlora  # noqa: F401
from compare import DEEP, assert_equal, assert_equal_grads, config_facts, saved_facts
from peer import Peer

pytestmark = pytest.mark.interop


def test_monteclora_samples_and_divergences(peer: Peer) -> None:
    assert_equal(recipes.run("monteclora_sampler"), peer.run("monteclora_sampler"))


def test_monteclora(peer: Peer, tmp_path: Path) -> None:
    here, there = str(tmp_path / "ours"), str(tmp_path / "theirs")
    ours, theirs = recipes.run("monteclora", folder=here), peer.run("monteclora", folder=there)
    assert_equal_grads(ours.pop("grads"), theirs.pop("grads"))
    assert_equal(saved_facts(ours.pop("saved")), saved_facts(theirs.pop("saved")), "saved")
    assert_equal(ours, theirs)
    for folder in (here, there):
        loaded = recipes.run("monteclora_loaded", folder=folder)
        assert_equal(loaded, peer.run("monteclora_loaded", folder=folder))
        assert_equal(loaded["y"], ours["eval"])


@pytest.mark.parametrize("use_gks", [False, True])
def test_arrow(use_gks: bool, peer: Peer, tmp_path: Path) -> None:
    experts = str(tmp_path / "experts")
    peer.run("arrow_experts", folder=experts)
    ours = recipes.run("arrow", folder=str(tmp_path / "ours"), experts=experts, use_gks=use_gks)
    theirs = peer.run("arrow", folder=str(tmp_path / "theirs"), experts=experts, use_gks=use_gks)
    for side in (ours, theirs):
        (config,) = side["saved"]["configs"].values()
        assert config["arrow_config"]["task_adapter_names"] == ["task_0", "task_1", "task_2"]
        (tensors,) = side["saved"]["tensors"].values()
        for key in tensors:  # they start at random and are not used
            tensors[key] = list(tensors[key].shape)
    assert_equal(saved_facts(ours.pop("saved")), saved_facts(theirs.pop("saved")), "saved")
    assert_equal(ours, theirs, ulps=DEEP)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"xlora_depth": 3, "xlora_size": 7, "layerwise_scalings": True, "softmax_temperature": 0.5},
        {"xlora_depth": 2, "xlora_size": 7, "top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
        {
            "scaling_pass_value": 0.4,
            "top_k_lora": 2,
            "enable_softmax_topk": True,
            "global_scaling_weight": 1.5,
            "xlora_dropout_p": 0.0,
        },
    ],
    ids=["default", "layerwise", "topk", "pass"],
)
def test_xlora(options: dict, peer: Peer, tmp_path: Path) -> None:
    experts, here, there = (str(tmp_path / name) for name in ("experts", "ours", "theirs"))
    peer.run("xlora_experts", folder=experts)
    ours = recipes.run("xlora", experts=experts, folder=here, options=options)
    theirs = peer.run("xlora", experts=experts, folder=there, options=options)
    assert_equal_grads(ours.pop("grads"), theirs.pop("grads"), ulps=DEEP)
    assert_equal(config_facts(ours.pop("config")), config_facts(theirs.pop("config")), "config")
    ours_saved, theirs_saved = ours.pop("tensors"), theirs.pop("tensors")
    for key, value in theirs_saved.items():  # theirs lack the layers whose number is an expert's name
        assert_equal(ours_saved[key], value, key)
    assert_equal(ours, theirs, ulps=DEEP)
    assert_equal(recipes.run("xlora_loaded", folder=here), ours["y"], "loaded", ulps=DEEP)


def test_what_we_save_of_xlora_the_release_reads(peer: Peer, tmp_path: Path) -> None:
    experts, folder = str(tmp_path / "experts"), str(tmp_path / "ours")
    peer.run("xlora_experts", folder=experts)
    ours = recipes.run("xlora", experts=experts, folder=folder, options={})
    assert_equal(peer.run("xlora_loaded", folder=folder), ours["y"], ulps=DEEP)
