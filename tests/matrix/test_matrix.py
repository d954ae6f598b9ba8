# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Every row of the table in every state that it has, against a float64 reference."""

from __future__ import annotations

import copy
import importlib.util
import json
import os

import pytest
import torch
from rig import (
    DROPOUT,
    Rig,
    assert_same_bits,
    check_training,
    disturb,
    fix_dropout,
    rig,
    same_bits,
    state_of,
)
from torch.nn import functional as F
from truth import adapter_of, assert_as_good_as, dequantised, floor, gain, merged_rows, rows_of, stored

from cases import Row, rows
from peft import PeftModel, get_peft_model_state_dict

INTERPRETED = os.environ.get("PEFT_MATRIX_INTERPRETED") == "1"  # set by test_interpreter.py, for a run of its own
# Rows whose kernels run again under the Triton interpreter, which computes bf16 products wrongly.
_INTERPRETED_FORMS = (
    "fp32", "fp16", "nf4", "fp4-nested", "int8", "hqq4", "hqq4-across", "hqq3", "gptq4", "gptq4-act-order", "awq4"
)  # fmt: skip
_INTERPRETED_LAYERS = (
    "linear", "linear_nobias", "transformers_conv1d", "embedding", "conv2d", "linear4bit", "linear8bit", "hqq_linear",
    "gptq_linear", "awq_linear",
)  # fmt: skip
_INTERPRETED_STATES = ("train", "dropout", "merged", "two_adapters", "saved")


def is_installed(row: Row) -> bool:
    return row.form.quant is None or importlib.util.find_spec(row.form.quantiser.package) is not None


def in_state(state: str) -> pytest.MarkDecorator:
    """Run a test on all rows that have a state, on the CPU, and on a GPU where there is one."""
    params = []
    for row in rows():
        if state not in row.states:
            continue
        small = row.method.triton and row.form.name in _INTERPRETED_FORMS and row.layer.name in _INTERPRETED_LAYERS
        small = small and state in _INTERPRETED_STATES and is_installed(row)
        marks = [pytest.mark.interpreted] if small else []
        params.append(pytest.param(row, "cpu", id=row.id, marks=marks))
        # Where there is no GPU, one state stands for all that is skipped.
        if torch.cuda.is_available() or (row.method.triton and state == "train"):
            params.append(pytest.param(row, "cuda", id=f"{row.id}-cuda", marks=pytest.mark.gpu))
    return pytest.mark.parametrize(("row", "device"), params)


@pytest.fixture(autouse=True)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are interpreted only in the run that asks for it; a row needs its quantiser."""
    if not INTERPRETED:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    if row is not None and not is_installed(row):
        pytest.skip(f"{row.form.quantiser.package} is not installed")


def check_route(layer: torch.nn.Module, row: Row, device: str) -> None:
    """DoRA ran where it was asked to: kernels on a GPU or under the interpreter, PyTorch elsewhere."""
    if not row.method.dora:
        return
    (route,) = layer.dora_routes().values()
    expected = "triton" if row.method.triton and (device == "cuda" or INTERPRETED) else "torch"
    assert route.path == expected, f"ran as {route}, expected {expected}"
    assert route.reason or expected == "triton"


# ---- outputs and gradients -------------------------------------------------------------------------------------------
@in_state("train")
def test_outputs_and_gradients(row: Row, device: str) -> None:
    made = rig(row, device)
    check_training(made)
    check_route(made.layer, row, device)


@in_state("dropout")
def test_dropout(row: Row, device: str) -> None:
    made = rig(row, device, lora_dropout=DROPOUT)
    if row.layer.kind == "embedding":  # dropout of ids means nothing, and does nothing
        check_training(made)
        return
    check_training(made, fix_dropout(made))


@in_state("lora_bias")
def test_lora_bias(row: Row, device: str) -> None:
    made = rig(row, device, lora_bias=True)
    check_training(made)
    if getattr(made.base, "bias", None) is None:
        return
    with torch.no_grad():
        before = made.model.eval()(made.x)
        made.model.merge_adapter(safe_merge=True)
        merged = made.model(made.x)
        bias = made.layer.get_base_layer().bias
        plain, truth = _merged_biases(made)
        assert_as_good_as(bias, plain, truth, "merged bias")
        assert merged.dtype == before.dtype
        made.model.unmerge_adapter()
    assert same_bits(made.layer.get_base_layer().bias, made.base.bias)


def _merged_biases(made: Rig) -> tuple[torch.Tensor, torch.Tensor]:
    """b + g∘s·c, with g = 1 for plain LoRA: in the row's precision, and in float64."""
    found = []
    for base, weight, dtype in (
        (made.base, made.plain_weight(), made.adapters()[0].a.dtype),
        (made.dense(), made.dense().weight, torch.float64),
    ):
        adapter = made.adapters()[0].to(dtype)
        gained = 1.0 if adapter.magnitude is None else gain(base, weight, adapter)
        found.append(made.base.bias.to(dtype) + gained * adapter.scaling * adapter.bias)
    return found[0].to(made.base.bias.dtype), found[1]


@in_state("low_precision")
def test_adapters_in_the_dtype_of_the_base(row: Row, device: str) -> None:
    made = rig(row, device, autocast_adapter_dtype=False)
    assert all(leaf.dtype == row.form.dtype for leaf in made.adapters()[0].leaves().values())
    check_training(made)


@in_state("eval")
def test_evaluation(row: Row, device: str) -> None:
    made = rig(row, device, lora_dropout=DROPOUT)
    made.model.eval()
    with torch.no_grad():
        y = made.model(made.x)
        made.check_output(y)
        assert same_bits(y, made.model(made.x)), "a second pass differs"
    with torch.inference_mode():
        assert same_bits(y, made.model(made.x)), "inference mode differs"
    made.x.requires_grad_(False)
    made.check_output(made.model(made.x), what="output of an input that needs no gradient")


@in_state("eval")
def test_training_after_evaluation(row: Row, device: str) -> None:
    """On the CPU bitsandbytes stores a 4-bit weight anew, its scales rounded, when its layer alone first infers."""
    if row.form.nested and device == "cpu":
        pytest.skip("on its way back to be read by bitsandbytes, such a weight is quantised once more")
    made = rig(row, device)
    made.model.eval()
    with torch.no_grad(), made.model.disable_adapter():
        assert same_bits(made.model(made.x.detach()), made.base(made.x.detach()))
    made.untouched.state_dict()  # takes that packing back, the rounding stays
    with torch.no_grad():
        made.check_output(made.model(made.x), what="output after the base layer ran alone")
    check_training(made)


@in_state("eval")
def test_one_item_and_none(row: Row, device: str) -> None:
    made = rig(row, device)
    with torch.no_grad():
        whole = made.x
        made.x = whole[:1]
        made.check_output(made.model(made.x), what="output of one item")
        try:
            expected = made.base(whole[:0])
        except RuntimeError:
            return  # the base layer itself takes no empty batch
        nothing = made.model(whole[:0])
    assert nothing.shape == expected.shape and nothing.dtype == expected.dtype


# ---- merging ---------------------------------------------------------------------------------------------------------
def requantised(matrix: torch.Tensor, row: Row, base: torch.nn.Module) -> torch.Tensor:
    """What storing a matrix in the row's format leaves of it."""
    if row.form.quant is None:
        return matrix.to(row.form.dtype)
    return row.form.quantiser.requantised(matrix, base, row.form)


def stored_rows(base: torch.nn.Module, row: Row) -> torch.Tensor:
    """A base layer's weight, by output feature."""
    return rows_of(base.weight, base) if row.form.quant is None else dequantised(base, row).to(row.form.dtype)


@in_state("merged")
def test_merging(row: Row, device: str) -> None:
    made = rig(row, device)
    dense = made.dense()
    with torch.no_grad():
        truth = merged_rows(dense, dense.weight, [adapter.to(torch.float64) for adapter in made.adapters()])
        plain = merged_rows(made.base, dense.weight.float(), made.adapters())
        made.model.eval().merge_adapter()
        assert made.layer.merged and made.layer.merged_adapters == ["default"]
        merged = stored_rows(made.layer.get_base_layer(), row)
        kept = requantised(plain, row, made.base)
        assert_as_good_as(merged, kept.to(merged.dtype), truth, "merged weight")
        y = made.model(made.x)
        assert y.dtype == made.base(made.x).dtype
        _, expected = made.plain_and_truth()
        assert_as_good_as(y, _with_rows(made, kept), expected, "output of the merged weight", ulps=4)


def _with_rows(made: object, kept: torch.Tensor) -> torch.Tensor:
    """The base layer's output with other weights, given by output feature."""
    base, x = made.base, made.x
    if made.row.layer.kind == "embedding":
        return F.embedding(x, kept.t())
    if made.row.layer.kind == "linear":
        return F.linear(x, kept.to(x), base.bias)
    conv = copy.deepcopy(base)
    conv.groups = 1
    conv.weight.data = kept.reshape(base.out_channels, base.in_channels, *base.kernel_size).to(x)
    return conv(x)


@in_state("safe_merged")
def test_safe_merging(row: Row, device: str) -> None:
    made, other = rig(row, device), rig(row, device)
    made.model.merge_adapter(safe_merge=True)
    other.model.merge_adapter()
    assert_same_bits(state_of(made.layer.get_base_layer()), state_of(other.layer.get_base_layer()))
    broken = rig(row, device)
    before = state_of(broken.layer.get_base_layer())
    with torch.no_grad():
        broken.adapters()[0].b.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="default"):
        broken.model.merge_adapter(safe_merge=True)
    assert not broken.layer.merged
    assert_same_bits(state_of(broken.layer.get_base_layer()), before)


@in_state("unmerged")
def test_unmerging(row: Row, device: str) -> None:
    made = rig(row, device, names=("default", "second"))
    made.model.eval()
    before, weight = state_of(made.layer.get_base_layer()), stored(made.layer.get_base_layer())
    with torch.no_grad():
        y = made.model(made.x)
        made.layer.merge(adapter_names=["default"])
        made.layer.merge(adapter_names=["second"])
        assert made.layer.merged_adapters == ["default", "second"]
        merged = stored_rows(made.layer.get_base_layer(), row).abs().max()
        made.model.unmerge_adapter()
        assert not made.layer.merged and stored(made.layer.get_base_layer()) is weight
        after = state_of(made.layer.get_base_layer())
        if row.form.quant is not None or row.layer.groups > 1:
            assert_same_bits(after, before)
            assert same_bits(made.model(made.x), y)
            return
    assert after.keys() == before.keys()
    # Each way rounds the weight once; taking gains between 1/2 and 2 out again can double what that left, twice.
    room = 8 * torch.finfo(row.form.dtype).eps * max(merged.item(), before["weight"].abs().max().item())
    assert (after["weight"] - before["weight"]).abs().max() <= room
    if "bias" in before:
        assert same_bits(after["bias"], before["bias"])


@in_state("merged")
def test_merge_and_unload(row: Row, device: str) -> None:
    made, other = rig(row, device), rig(row, device)
    with torch.no_grad():
        other.model.eval().merge_adapter()
        expected = other.model(other.x)
        plain = made.model.eval().merge_and_unload()
        assert type(plain.body) is type(made.base)
        assert same_bits(plain(made.x), expected)


# ---- activation ------------------------------------------------------------------------------------------------------
@in_state("disabled")
def test_disabling(row: Row, device: str) -> None:
    made = rig(row, device)
    made.model.eval()
    with torch.no_grad():
        base, adapted = made.base(made.x), made.model(made.x)
        assert not torch.equal(base, adapted)
        with made.model.disable_adapter():
            assert same_bits(made.model(made.x), base)
            assert not any(leaf.requires_grad for leaf in made.adapters()[0].leaves().values())
        assert same_bits(made.model(made.x), adapted)
        assert all(leaf.requires_grad for leaf in made.adapters()[0].leaves().values())
        made.model.merge_adapter()
        with made.model.disable_adapter():
            y = made.model(made.x)
            exact = row.form.quant is not None or row.layer.groups > 1
            room = 0.0 if exact else floor(row.form.dtype, made.dense().weight, 40) * 64
            assert (y - base).abs().max() <= room
    assert same_bits(stored(made.model.unload().body), stored(made.layer.get_base_layer()))


@in_state("two_adapters")
def test_two_adapters(row: Row, device: str) -> None:
    made = rig(row, device, names=("default", "second"))
    made.model.eval()
    with torch.no_grad():
        first = made.model(made.x)
        made.check_output(first, "default", what="output of the first")
        made.model.set_adapter("second")
        assert not any(leaf.requires_grad for leaf in adapter_of(made.layer, "default").leaves().values())
        second = made.model(made.x)
        made.check_output(second, "second", what="output of the second")
        made.model.base_model.set_adapter(["default", "second"])
        made.check_output(made.model(made.x), "default", "second", what="output of both")
        made.model.set_adapter("default")
        assert same_bits(made.model(made.x), first), "switching there and back changed the output"
        made.model.delete_adapter("default")
        assert made.model.active_adapters == ["second"]
        assert same_bits(made.model(made.x), second), "deleting the first changed the second"
    assert not [name for name, _ in made.model.named_parameters() if "default" in name]


@in_state("two_adapters")
def test_a_change_of_weights_is_seen(row: Row, device: str) -> None:
    """Whatever is reused between passes must not outlive a change of A, B, scaling or the base."""
    made = rig(row, device)
    made.model.eval()
    with torch.no_grad():
        made.model(made.x)
        adapter_of(made.layer).b.data.mul_(-1.5)
        made.check_output(made.model(made.x), what="output after B changed")
        adapter_of(made.layer).a.copy_(torch.rand_like(adapter_of(made.layer).a) - 0.5)
        made.check_output(made.model(made.x), what="output after A changed")
        made.layer.set_scale("default", 0.5)
        made.check_output(made.model(made.x), what="output after the scaling changed")
        if row.form.quant is None:
            made.layer.get_base_layer().weight.mul_(1.25)
            made.base.weight.mul_(1.25)
            made.check_output(made.model(made.x), what="output after the base weight changed")


# ---- saving and copying ----------------------------------------------------------------------------------------------
def check_reloaded(row: Row, device: str, folder: str, **options: bool) -> None:
    made = rig(row, device)
    made.model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.get("use_dora_triton", False) == row.method.triton
    assert row.method.triton or "use_dora_triton" not in config
    loaded = PeftModel.from_pretrained(row.layer.model(row.form, device), folder, **options)
    assert not [name for name, tensor in loaded.named_parameters() if tensor.is_meta]
    assert_same_bits(get_peft_model_state_dict(loaded), get_peft_model_state_dict(made.model))
    with torch.no_grad():
        assert same_bits(loaded.eval()(made.x), made.model.eval()(made.x))


@in_state("saved")
def test_saved_and_loaded(row: Row, device: str, tmp_path: object) -> None:
    check_reloaded(row, device, tmp_path)


@in_state("low_cpu_mem")
def test_loaded_from_meta(row: Row, device: str, tmp_path: object) -> None:
    check_reloaded(row, device, tmp_path, low_cpu_mem_usage=True)


@in_state("deepcopied")
def test_deepcopied(row: Row, device: str) -> None:
    made = rig(row, device)
    with torch.no_grad():
        y = made.model.eval()(made.x)
        twin = copy.deepcopy(made.model)
        assert same_bits(twin(made.x), y)
        disturb(twin.base_model.model.body, "default")
        adapter_of(twin.base_model.model.body).b.mul_(2)
        assert not torch.equal(twin(made.x), y)
        assert same_bits(made.model(made.x), y)
