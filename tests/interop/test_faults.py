# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Upstream's faults: each fails there, so that the table may exclude it, and is right here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import faults  # noqa: F401  registers its recipes
import faults_dora  # noqa: F401
import faults_lora  # noqa: F401  likewise
import faults_megatron  # noqa: F401  likewise
import options
import pytest
import recipes
import recipes_family  # noqa: F401
import recipes_xlora  # noqa: F401
import torch
from peer import Peer, PeerError

pytestmark = pytest.mark.interop
EXACT = 1e-5  # float32 outputs of order one, through one layer or three


@dataclass(frozen=True)
class Fault:
    """A recipe, when its result is right, and what happens there.

    Args:
        recipe: Its name.
        right: Says whether a result is right.
        raises: Name of the exception that upstream raises, several joined by `|`; empty where it gives a wrong result.
        arguments: Of the recipe.
        package: What must be installed besides what the tests need.
    """

    recipe: str
    right: Callable[[Any], bool]
    raises: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    package: str = ""

    @property
    def id(self) -> str:
        return "-".join([self.recipe, *(str(value) for value in self.arguments.values())])


def _is_true(value: Any) -> bool:
    return value is True


def _is_small(value: float) -> bool:
    return value <= EXACT


def _is_one(value: float) -> bool:
    return abs(value - 1) <= EXACT


def _is_refused(facts: dict[str, Any]) -> bool:
    return bool(facts["error"]) and facts["as before"]


def _merge(layer: str, method: str, raises: str = "") -> Fault:
    return Fault("change_by_merging", _is_small, raises, {"layer": layer, "method": method})


def _bytes(form: str, method: str) -> Fault:
    return Fault("bytes_after_unmerging", _is_true, arguments={"form": form, "method": method})


FAULTS = (
    *(Fault("lora_bias_merged", _is_one, arguments={"form": form}) for form in ("nf4", "fp4-nested", "int8")),
    *(Fault("lora_bias_merged", _is_one, "RuntimeError", {"form": form, "safe": True}) for form in ("nf4", "int8")),
    *(_merge("conv2d_groups", method, "NotImplementedError") for method in ("lora", "dora")),
    *(_merge("conv2d_reflect", method) for method in ("lora", "dora")),
    *(_bytes(form, method) for form in ("nf4", "nf4-nested", "fp4", "int8") for method in ("lora", "dora")),
    Fault("zero_row", _is_true),
    Fault("int8_passes", _is_true, "AttributeError"),
    Fault("dilated", lambda shape: shape == [2, 6, 4, 6], "RuntimeError"),
    Fault("grouped_norm", _is_small),
    Fault("half_conv_dropout", lambda dtype: dtype == "torch.bfloat16", "RuntimeError"),
    Fault("meta_rounding", _is_true),
    Fault("unloaded_adapter", _is_true),
    # There the names are still being handed out by a hook when the next call comes, which has none.
    Fault(
        "after_a_refused_mixed_batch",
        lambda facts: facts == {"refused": "ValueError", "as before": True},
        "ValueError",
    ),
    Fault("dora_mixed_batch", _is_small, "ValueError"),
    *(
        Fault("dora_merged", _is_small, "ValueError", {"kind": kind})
        for kind in ("packed", "separate", "experts", "lora_bias")
    ),
    *(
        Fault("mixed_rows", _is_small, error, {"kind": kind, "use_dora": dora})
        for kind, plain in (("packed", "TypeError"), ("experts", "ValueError"))
        for dora, error in ((False, plain), (True, "ValueError"))
    ),
    Fault("dora_on_activated_tokens", _is_small, "ValueError"),
    Fault("tied_merge", _is_small),
    *(Fault("dirichlet_divergence", lambda least: least > -EXACT, arguments={"prior": prior}) for prior in (0.1,)),
    Fault("weighted_magnitude", lambda facts: all(_is_one(ratio) for ratio in facts["ratio"])),
    Fault("hotswapped", _is_small, "KeyError"),
    Fault("biases_of_two_after_reload", lambda changes: all(_is_small(change) for change in changes.values())),
    Fault("modules_to_save_after_rounds", lambda names: names == ["classifier", "score"]),
    Fault("olora_on_conv1d", _is_small, "RuntimeError"),
    Fault("attention_keeps_its_bits", _is_true),
    Fault("attention_counts_once", _is_small),
    Fault(
        "change_by_merging_shared", _is_small, arguments={"kind": "replication", "layer_replication": [(0, 2), (1, 3)]}
    ),
    *(
        Fault(
            "change_by_merging_shared",
            _is_small,
            arguments={"kind": "tied", "target_modules": [name], "ensure_weight_tying": True, "use_dora": dora},
        )
        for name in ("embed_tokens", "lm_head")
        for dora in (False, True)
    ),
    Fault("tied_after_a_move", _is_true),
    Fault("block_diagonal_delta", lambda shape: shape == [128, 64]),
    Fault("block_diagonal_random", _is_true),
    Fault("block_diagonal_on_four_bits", lambda shape: shape == [4, 32]),
    Fault("kasa_on_four_bits", _is_true),
    Fault("embedding_by_lorafa", _is_true),
    Fault("biases_of_an_old_file", _is_small),
    Fault(
        "names_of_biases", lambda names: names == [f"base_model.model.{name}.bias" for name in ("0.base_layer", "1")]
    ),
    *(Fault("converted_dora", _is_small, arguments={"start": start}) for start in ("pissa", "olora")),
    Fault("xlora_kept", _is_true),
    Fault("on_megatron", _is_small, "KeyError"),
    Fault("on_megatron", _is_small, "ValueError", {"use_dora": True}),
    Fault("experts_of_an_older_file", _is_small, "RuntimeError"),
    Fault("experts_from_a_state_dict", _is_small, "ValueError"),
    Fault(
        "named_shared_experts",
        lambda kinds: kinds == ["shared_experts"],
        arguments={"targets": r".*shared_experts\.(gate|up|down)_proj"},
    ),
    Fault(
        "named_shared_experts",
        lambda kinds: kinds == ["down_proj", "experts", "gate_proj", "shared_experts", "up_proj"],
        arguments={"targets": ["gate_proj", "up_proj", "down_proj"]},
    ),
    Fault("left_by_unload", _is_true),
    Fault("mixed_norms", _is_true, "TypeError"),
    Fault("activated_without_a_task", _is_true),
    Fault("made_without_memory", _is_true, arguments={"layer_replication": [(0, 2), (1, 3)]}),
    *(
        Fault("made_without_memory", _is_true, "RuntimeError", {"init_lora_weights": start})
        for start in ("pissa", "olora")
    ),
    Fault("thawing_nothing", lambda error: error == "ValueError"),
    # a build of torch without CUDA asserts, one with CUDA and no driver raises
    Fault("offloaded", _is_true, "AssertionError|RuntimeError"),
    Fault("torchao_dora_merged", lambda change: change < 0.1, package="torchao"),
    Fault("torchao_two_merged", lambda change: change < 0.1, "UnboundLocalError", package="torchao"),
    Fault("torchao_safe_merge", lambda error: error == "ValueError", package="torchao"),
    *(
        Fault("refusal", _is_refused, arguments=options)
        for options in (
            {"lora_dropout": -0.5},
            {"bias": "some"},
            {"bias": "some", "further": True},
            {"rank_pattern": {"1": 0}},
        )
    ),
)


# The faults that the project set out to mend, as far as this version carries the methods: which rows above show each.
SET_OUT = {
    "lora_bias merged into a 4- or 8-bit layer forgets the scaling, and a safe merge raises": ["lora_bias_merged"],
    "DoRA on torchao merges without the magnitude": ["torchao_dora_merged"],
    "two adapters on torchao merge with an UnboundLocalError": ["torchao_two_merged"],
    "a safe merge on torchao tests before it adds": ["torchao_safe_merge"],
    "convolutions with groups refuse to merge": ["change_by_merging"],
    "unmerging a quantised layer does not give the old bytes back": ["bytes_after_unmerging"],
    "DoRA on a row of zeros gives NaN": ["zero_row"],
    "hotswap fails on the magnitude": ["hotswapped"],
    "add_weighted_adapter keeps a fresh magnitude": ["weighted_magnitude"],
    "int8 layers on the CPU survive one forward": ["int8_passes"],
    "a refused mixed batch leaves a hook behind": ["after_a_refused_mixed_batch"],
    "ephemeral_gpu_offload asserts CUDA": ["offloaded"],
    "convolutions lose dilation": ["dilated"],
    "OLoRA fails on a Conv1D that is not square": ["olora_on_conv1d"],
    "MultiheadAttention rewrites its packed weight at every forward": ["attention_keeps_its_bits"],
    "bias='all' with a second adapter on other modules changes after a reload": ["biases_of_two_after_reload"],
    "the bias is saved under a wrapped name": ["names_of_biases"],
    "modules_to_save grows duplicates": ["modules_to_save_after_rounds"],
    "X-LoRA saves an empty classifier": ["xlora_kept"],
    "an unknown bias is accepted": ["refusal"],
}
# Thought to be faults as well, but 0.21.2 refuses these too: rows of options.REFUSED hold both to it.
NO_FAULTS = {"r=-1 is accepted": "refused-r--1", "an unknown start is accepted": "refused-init_lora_weights-pisa"}


@pytest.mark.parametrize("sentence", SET_OUT)
def test_the_fault_has_a_row(sentence: str) -> None:
    assert set(SET_OUT[sentence]) <= {fault.recipe for fault in FAULTS}


def test_what_is_no_fault_is_refused_by_both() -> None:
    assert all(options.OPTIONS[name].refused for name in NO_FAULTS.values())


def _parameter(fault: Fault) -> Any:
    missing = bool(fault.package) and find_spec(fault.package) is None
    return pytest.param(
        fault, id=fault.id, marks=pytest.mark.skipif(missing, reason=f"{fault.package} is not installed")
    )


every_fault = pytest.mark.parametrize("fault", [_parameter(fault) for fault in FAULTS])


@every_fault
def test_it_passes_here(fault: Fault) -> None:
    result = recipes.run(fault.recipe, **fault.arguments)
    assert fault.right(result), result


@every_fault
def test_it_fails_there(fault: Fault, peer: Peer) -> None:
    if fault.recipe == "offloaded" and torch.cuda.is_available():
        pytest.skip("it fails where there is no GPU")
    if fault.raises:
        with pytest.raises(PeerError) as raised:
            peer.run(fault.recipe, **fault.arguments)
        assert raised.value.kind in fault.raises.split("|"), raised.value
        return
    result = peer.run(fault.recipe, **fault.arguments)
    assert not fault.right(result), f"upstream gives {result}: no fault any more, the table must not exclude it"
