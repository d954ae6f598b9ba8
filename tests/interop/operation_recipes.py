# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What both sides do with adapters that stand: combine, swap, rescale, convert, cut, and train by LoRA's optimizers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from options import OPTIONS, base_and_input
from recipes import evaluated, fill, recipe, saved_files, trainable
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer


def _model(base: str = "two", names: tuple[str, ...] = ("default",), **options: Any) -> tuple[Any, torch.Tensor]:
    """A model with filled adapters, the first one active; `second` holds what further adapters have different."""
    second = options.pop("second", {})
    module, x = base_and_input(base)
    targets = ["0", "1"] if base == "embedded" else ["first", "second"]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, **options}
    torch.manual_seed(7)
    model = get_peft_model(module, LoraConfig(**settings), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**settings, **second}))
    for name in names:
        model.set_adapter(name)
        fill(model, salt=name)
    model.set_adapter(names[0])
    return model, x


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _deltas(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    return {name: layer.get_delta_weight(adapter) for name, layer in _layers(model).items()}


# ---- combining -------------------------------------------------------------------------------------------------------
@recipe
def weighted(combination_type: str, base: str = "two", **options: Any) -> dict[str, Any]:
    """The update, ranks and outputs of a weighted combination of two adapters."""
    settings = {key: options.pop(key) for key in ("use_dora", "lora_alpha", "second") if key in options}
    weights = options.pop("weights", [0.7, 0.4])
    model, x = _model(base, ("default", "other"), **settings)
    torch.manual_seed(13)
    model.add_weighted_adapter(["default", "other"], weights, "mixed", combination_type=combination_type, **options)
    model.set_adapter("mixed")
    with evaluated(model):
        y = model(x)
    return {
        "deltas": _deltas(model, "mixed"),
        "ranks": {name: layer.r["mixed"] for name, layer in _layers(model).items()},
        "scalings": {name: layer.scaling["mixed"] for name, layer in _layers(model).items()},
        "y": y,
    }


@recipe
def reduced(top_k: int, threshold_epsilon: float, mitigation_lambda: float) -> dict[str, Any]:
    """The update that is left when intruder dimensions are scaled down."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model, x = _model()
    reduce_intruder_dimension(
        model, top_k=top_k, threshold_epsilon=threshold_epsilon, mitigation_lambda=mitigation_lambda, logging_sink=None
    )
    with evaluated(model):
        return {"deltas": _deltas(model, "intruder_reduced"), "active": model.active_adapters, "y": model(x)}


# ---- scaling, mixed batches, swapping --------------------------------------------------------------------------------
@recipe
def rescaled(**options: Any) -> dict[str, Any]:
    """Outputs inside and after a block with other scalings, and after the layers' own ways of scaling."""
    from peft.helpers import rescale_adapter_scale

    model, x = _model(**options)
    out = {}
    with evaluated(model):
        with rescale_adapter_scale(model, 0.3):
            out["inside"] = model(x)
        out["after"] = model(x)
        for step, scale in (("scale_layer", 2.5), ("unscale_layer", 2.0), ("unscale_layer", None)):
            for layer in _layers(model).values():
                getattr(layer, step)(scale)
            out[f"{step} {scale}"] = model(x)
        for layer in _layers(model).values():
            layer.set_scale("default", 0.5)
        out["set_scale"] = model(x)
    return out


@recipe
def mixed_batch(base: str, **options: Any) -> dict[str, Any]:
    """A batch whose rows use two adapters and none, and the gradients that it gives."""
    model, x = _model(base, ("default", "other"), second={"r": 2, "lora_alpha": 3}, **options)
    if base == "embedded":
        x = torch.cat([x, x.flip(1)])[:3]
    else:
        x = torch.cat([x, x.flip(0)])[:3]
    model.eval()
    with torch.no_grad():
        return {"y": model(x, adapter_names=["other", "__base__", "default"])}


@recipe
def swapped(target_rank: int | None = None, rank: int = 4, alpha: int = 9, **options: Any) -> dict[str, Any]:
    """Outputs before and after a saved adapter takes another's place, and what is saved then."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model, x = _model(**options)
    other, _ = _model(names=("other",), **{**options, "r": rank, "lora_alpha": alpha})
    with tempfile.TemporaryDirectory() as folder, evaluated(model):
        other.save_pretrained(folder)
        if target_rank is not None:
            prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        before = model(x)
        hotswap_adapter(model, str(Path(folder, "other")), adapter_name="default", torch_device="cpu")
        return {"before": before, "after": model(x)}


@recipe
def asked(base: str = "llama", **options: Any) -> dict[str, Any]:
    """What a model with two adapters says of its layers and of itself, and keys that are not of the one loaded."""
    targets = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    model, _ = _model(base, ("default", "other"), **{**targets, **options})
    state = peft.get_peft_model_state_dict(model, adapter_name="other")
    state |= {"base_model.model.nothing.lora_A.weight": torch.zeros(1), "nothing": torch.zeros(1)}
    unknown = peft.set_peft_model_state_dict(model, state, adapter_name="other").unexpected_keys
    layers = [vars(layer) for layer in model.get_layer_status()]
    return {"layers": layers, "model": vars(model.get_model_status()), "unknown": sorted(unknown)}


# ---- conversions -----------------------------------------------------------------------------------------------------
@recipe
def converted(name: str, folder: str) -> dict[str, Any]:
    """An adapter whose start changed the base, saved as one for the unchanged base, and what that one gives."""
    option = OPTIONS[name]
    base, x = base_and_input(option.base)
    torch.manual_seed(5)
    if option.before is not None:
        option.before(base, copy.deepcopy(option.config()), x)
    torch.manual_seed(7)
    model = get_peft_model(base, option.config())
    initial = str(Path(folder, "initial"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = option.config().init_lora_weights
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(1.5)
    with evaluated(model):
        y = model(x)
    model.save_pretrained(str(Path(folder, "plain")), path_initial_model_for_weight_conversion=initial)
    plain = PeftModel.from_pretrained(base_and_input(option.base)[0], str(Path(folder, "plain")))
    with evaluated(plain):
        found = plain(x)
    saved = saved_files(Path(folder, "plain"))
    shapes = {key: list(tensor.shape) for key, tensor in next(iter(saved["tensors"].values())).items()}
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora")
    return {
        "y": y,
        "found": found,
        "shapes": shapes,
        "config": {key: saved["configs"]["adapter_config.json"][key] for key in kept},
    }


@recipe
def as_lora(rank: float) -> dict[str, Any]:
    """What `convert_to_lora` makes of an adapter."""
    from peft.tuners.lora import convert_to_lora

    model, _ = _model()
    config, state = convert_to_lora(model, rank)
    names = sorted({key.rpartition(".lora_")[0] for key in state})
    return {
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "deltas": {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in names},
        "keys": sorted(state),
    }


@recipe
def loftq(bits: int, iterations: int) -> dict[str, Any]:
    """What LoftQ's own function makes of a weight: the quantised weight and the product that repairs it."""
    from peft.utils.loftq_utils import loftq_init

    torch.manual_seed(3)
    weight = torch.randn(64, 64)
    quantised, a, b = loftq_init(weight, num_bits=bits, reduced_rank=8, num_iter=iterations)
    return {"quantised": quantised.float(), "product": b.float() @ a.float()}


@recipe
def loftq_replaced(folder: str) -> dict[str, Any]:
    """The product that `replace_lora_weights_loftq` gives the adapters of a 4-bit model."""
    from safetensors.torch import save_file

    plain = _plain_two()
    save_file(
        {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, f"{folder}/model.safetensors"
    )
    quantised, _ = base_and_input("two-nf4")
    torch.manual_seed(7)
    model = get_peft_model(quantised, LoraConfig(r=4, target_modules=["first", "second"]))
    peft.replace_lora_weights_loftq(model, model_path=f"{folder}/model.safetensors")
    return {"deltas": _deltas(model, "default")}


def _plain_two() -> nn.Module:
    """The layers that the 4-bit model was quantised from."""
    from options import Two

    torch.manual_seed(0)
    plain = Two()
    torch.manual_seed(0)
    unquantised = Two("nf4")  # quantised when it is moved, so still whole
    plain.load_state_dict({name: tensor.detach() for name, tensor in unquantised.state_dict().items()}, strict=False)
    return plain


# ---- optimizers ------------------------------------------------------------------------------------------------------
def _loraplus(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-3
    )


def _lorafa(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.1)


def _riemannian(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "loraplus": _loraplus,
    "lorafa": _lorafa,
    "riemannian": _riemannian,
}


@recipe
def stepped(optimizer: str, steps: int = 3, **options: Any) -> dict[str, Any]:
    """The parameters after some steps, and how the optimizer groups them."""
    model, x = _model(**options)
    model.train()
    chosen = OPTIMIZERS[optimizer](model)
    for step in range(steps):
        chosen.zero_grad()
        (model(x) - step).square().mean().backward()
        chosen.step()
    groups = [
        [group["lr"], group["weight_decay"], len(group["params"]), sum(p.numel() for p in group["params"])]
        for group in chosen.param_groups
    ]
    return {"parameters": {name: p for name, p in model.named_parameters() if "lora_" in name}, "groups": groups}
