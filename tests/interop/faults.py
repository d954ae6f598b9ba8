# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Recipes that show upstream's faults, and on our side that they are not there."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from recipes import adapted, base_state, evaluated, fill, recipe, row_of
from torch import nn

import cases
import peft


def _bytes_of(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        key: bytes(value.detach().reshape(-1).contiguous().view(torch.uint8).tolist()) for key, value in state.items()
    }


@recipe
def lora_bias_merged(form: str, safe: bool = False) -> float:
    """By what the base's bias grew in a merge, over the adapter's bias: the scaling, if nothing is forgotten."""
    layer = "linear8bit" if form.startswith("int8") else "linear4bit"
    model = adapted(row_of(layer, form, "lora"), lora_bias=True)
    wrapped = model.base_model.model.body
    before = wrapped.get_base_layer().bias.detach().clone()
    model.merge_adapter(safe_merge=safe)
    grown = wrapped.get_base_layer().bias.detach() - before
    return ((grown / wrapped.lora_B["default"].bias).mean() / wrapped.scaling["default"]).item()


@recipe
def change_by_merging(layer: str, method: str) -> float:
    """The largest change of the output that merging makes."""
    row = row_of(layer, "fp32", method)
    model, x = adapted(row), row.layer.input(row.form)
    with evaluated(model):
        before = model(x)
        model.merge_adapter()
        return (model(x) - before).abs().max().item()


@recipe
def bytes_after_unmerging(form: str, method: str) -> bool:
    """Whether merging and unmerging leaves every stored byte as it was."""
    model = adapted(row_of("linear8bit" if form.startswith("int8") else "linear4bit", form, method))
    before = _bytes_of(base_state(model))
    model.merge_adapter()
    model.unmerge_adapter()
    return _bytes_of(base_state(model)) == before


@recipe
def zero_row() -> bool:
    """Whether DoRA's output and gradients are finite where a row of the base weight is zero."""
    row = row_of("linear", "fp32", "dora")
    base = row.layer.model(row.form)
    with torch.no_grad():
        base.body.weight[3] = 0
    model = peft.get_peft_model(base, peft.LoraConfig(**row.options()))
    y = model(row.layer.input(row.form))
    y.sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return all(bool(torch.isfinite(tensor).all()) for tensor in (y, *grads))


@recipe
def int8_passes(passes: int = 3) -> bool:
    """Whether several passes of DoRA on an int8 layer on the CPU give the same output."""
    row = row_of("linear8bit", "int8", "dora")
    model, x = adapted(row), row.layer.input(row.form)
    with evaluated(model):
        outputs = [model(x) for _ in range(passes)]
    return all(torch.equal(outputs[0], y) for y in outputs[1:])


@recipe
def dilated() -> list[int]:
    """The shape of the output of LoRA on a convolution with dilation."""
    row = row_of("conv2d_dilation", "fp32", "lora")
    return list(adapted(row)(row.layer.input(row.form)).shape)


@recipe
def grouped_norm() -> float:
    """How far DoRA on a grouped convolution is from plain LoRA, its magnitude being the norm of the whole weight."""
    row = row_of("conv2d_groups", "fp32", "dora")
    model, x = adapted(row), row.layer.input(row.form)
    layer = model.base_model.model.body
    base, groups = layer.get_base_layer(), row.layer.groups
    a, b = layer.lora_A["default"].weight.flatten(1), layer.lora_B["default"].weight.flatten(1)
    whole = layer.scaling["default"] * torch.block_diag(*b.chunk(groups)) @ a
    rows = base.weight.flatten(1).chunk(groups)
    with torch.no_grad():
        whole += torch.block_diag(*rows)
        layer.lora_magnitude_vector["default"].weight.copy_(whole.norm(dim=1).reshape(1, -1, 1, 1))
    with evaluated(model):
        low_rank = layer.lora_B["default"](layer.lora_A["default"](x))
        return (model(x) - base(x) - layer.scaling["default"] * low_rank).abs().max().item()


@recipe
def half_conv_dropout() -> str:
    """The output's dtype of DoRA with dropout on a half-precision convolution."""
    row = row_of("conv2d", "bf16", "dora")
    model = adapted(row, lora_dropout=0.5).train()
    return str(model(row.layer.input(row.form)).dtype)


@recipe
def meta_rounding() -> bool:
    """Whether an adapter on a bf16 base, loaded from meta, is what was saved."""
    row = row_of("linear", "bf16", "lora")
    model = adapted(row)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(row.layer.model(row.form), folder, low_cpu_mem_usage=True)
    written = peft.get_peft_model_state_dict(model)
    return all(torch.equal(value, written[key]) for key, value in peft.get_peft_model_state_dict(loaded).items())


@recipe
def unloaded_adapter() -> bool:
    """Whether a call is refused while its adapter has no values."""
    row = row_of("linear", "fp32", "lora")
    model = adapted(row, filled=False, low_cpu_mem_usage=True)
    try:
        model(row.layer.input(row.form))
    except RuntimeError as error:
        return "load the adapter" in str(error)
    return False


def _llama(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    import models

    base, inputs = models.Case("llama", {}).base()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"], **options)
    return peft.get_peft_model(base, config), inputs["input_ids"]


@recipe
def after_a_refused_mixed_batch() -> dict[str, Any]:
    """What a call with one name too few raises, and whether the calls after it are as the ones before."""
    model, ids = _llama()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    fill(model)
    with evaluated(model):
        before = model(ids).logits
        try:
            model(ids, adapter_names=["default"])
            refused = "no error"
        except ValueError as error:
            refused = type(error).__name__
        return {"refused": refused, "as before": torch.equal(model(ids).logits, before)}


@recipe
def dora_mixed_batch() -> float:
    """How far a batch with a DoRA row and a base row is from the two computed apart."""
    model, ids = _llama(use_dora=True)
    fill(model)
    with evaluated(model):
        alone = model(ids).logits
        try:
            mixed = model(ids, adapter_names=["default", "__base__"]).logits
        except ValueError:
            model(ids)  # a hook that was left behind would break this one too
            raise
        with model.disable_adapter():
            base = model(ids).logits
        return max((mixed[0] - alone[0]).abs().max().item(), (mixed[1] - base[1]).abs().max().item())


@recipe
def weighted_magnitude() -> dict[str, Any]:
    """The magnitude of an adapter that add_weighted_adapter makes of one DoRA adapter alone, over that one's own."""
    model, _ = _llama(use_dora=True)
    fill(model)
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    layer = next(module for module in model.modules() if getattr(module, "lora_magnitude_vector", None))
    one, copy = (layer.lora_magnitude_vector[name].weight for name in ("default", "copy"))
    return {"ratio": (copy / one).tolist()}


@recipe
def hotswapped() -> float:
    """How far a DoRA adapter that was swapped in is from the one that was saved."""
    from peft.utils.hotswap import hotswap_adapter

    model, ids = _llama(use_dora=True)
    fill(model, salt="one")
    other, _ = _llama(use_dora=True)
    fill(other, salt="two")
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
    with evaluated(model), evaluated(other):
        return (model(ids).logits - other(ids).logits).abs().max().item()


@recipe
def biases_of_two_after_reload() -> dict[str, float]:
    """How far the outputs of two adapters are, after a reload, from what they were; the first trains every bias."""
    import models

    base, inputs = models.Case("bert", {}).base()
    first = peft.LoraConfig(r=3, target_modules=["query"], bias="all")
    model = peft.get_peft_model(base, first)
    fill(model)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["value"]))
    model.set_adapter("other")
    fill(model)
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ("default", "other"):
            model.set_adapter(name)
            with evaluated(model):
                outputs[name] = model(**inputs).last_hidden_state
        fresh, _ = models.Case("bert", {}).base()
        loaded = peft.PeftModel.from_pretrained(fresh, folder)
        loaded.load_adapter(f"{folder}/other", "other")
    changed = {}
    for name, y in outputs.items():
        loaded.set_adapter(name)
        with evaluated(loaded):
            changed[name] = (loaded(**inputs).last_hidden_state - y).abs().max().item()
    return changed


@recipe
def modules_to_save_after_rounds(rounds: int = 3) -> list[str]:
    """`modules_to_save` of a classifier's config after saving and loading it some times."""
    import models

    case = models.CASES["bert-cls"]
    base, _ = case.base()
    model = peft.get_peft_model(base, peft.LoraConfig(**case.options))
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = peft.PeftModel.from_pretrained(case.base()[0], folder)
    return sorted(model.peft_config["default"].modules_to_save)


@recipe
def refusal(further: bool = False, **options: Any) -> dict[str, Any]:
    """The error that making an adapter raises, empty if none, and whether the model is then as it was."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    config = peft.LoraConfig(target_modules=["0", "1"], **options)
    held = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])) if further else model
    before = [(name, parameter.requires_grad) for name, parameter in held.named_parameters()]
    error = ""
    try:
        held.add_adapter("other", config) if further else peft.get_peft_model(held, config)
    except (TypeError, ValueError, NotImplementedError) as raised:
        error = type(raised).__name__
    after = [(name, parameter.requires_grad) for name, parameter in held.named_parameters()]
    return {"error": error, "as before": after == before}


@recipe
def offloaded() -> bool:
    """Whether DoRA with ephemeral_gpu_offload works where there is no GPU."""
    row = row_of("linear", "fp32", "dora")
    config = peft.LoraConfig(**row.options(), runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    model = peft.get_peft_model(row.layer.model(cases.FORMATS["fp32"]), config)
    return bool(torch.isfinite(model(row.layer.input(row.form))).all())


# ---- torchao ---------------------------------------------------------------------------------------------------------
def _on_torchao(method: str, names: tuple[str, ...] = ("default",)) -> tuple[Any, torch.Tensor]:
    """A model of one int8 layer of torchao with filled adapters, and an input."""
    from torchao.quantization import Int8WeightOnlyConfig

    row = row_of("torchao_linear", "ao-int8", method)
    base = row.layer.model(row.form)
    # as on a model that transformers quantised, which knows how to quantise again
    settings = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    base.hf_quantizer = SimpleNamespace(quantization_config=settings)
    config = peft.LoraConfig(**row.options())
    model = peft.get_peft_model(base, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        model.set_adapter(name)
        fill(model, salt=name)
    return model, row.layer.input(row.form)


@recipe
def torchao_dora_merged() -> float:
    """How much merging changes the output, over how much the adapter does; rounding changes it by a percent or two."""
    model, x = _on_torchao("dora")
    layer = model.base_model.model.body
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(2)
    with evaluated(model):
        before = model(x)
        with model.disable_adapter():
            effect = (model(x) - before).norm()
        model.merge_adapter()
        return ((model(x) - before).norm() / effect).item()


@recipe
def torchao_two_merged() -> float:
    """The same of two adapters, merged at once."""
    model, x = _on_torchao("lora", ("default", "other"))
    model.base_model.set_adapter(["default", "other"])
    with evaluated(model):
        before = model(x)
        with model.disable_adapter():
            effect = (model(x) - before).norm()
        model.merge_adapter(["default", "other"])
        return ((model(x) - before).norm() / effect).item()


@recipe
def torchao_safe_merge() -> str:
    """The error that a safe merge of a broken adapter raises; empty if none."""
    model, _ = _on_torchao("lora")
    with torch.no_grad():
        model.base_model.model.body.lora_B["default"].weight[0, 0] = float("nan")
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError as error:
        return type(error).__name__
    return ""
