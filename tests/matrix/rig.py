# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A row of the table made into an adapted model, with an untouched copy of its base layer beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from truth import Adapter, adapter_of, assert_as_good_as, dense_base, output

from cases import Row
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

DROPOUT = 0.4


class FixedDropout(nn.Dropout):
    """Dropout whose mask is known.

    Args:
        mask: What it multiplies an input by while it trains.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(DROPOUT)
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.to(x) if self.training else x


@dataclass
class Rig:
    """An adapted model.

    Args:
        row: Its row.
        model: The `PeftModel`.
        layer: Its one adapted layer.
        untouched: A copy of the layer from before, frozen.
        x: An input.
    """

    row: Row
    model: PeftModel
    layer: LoraLayer
    untouched: nn.Module
    x: torch.Tensor

    @property
    def base(self) -> nn.Module:
        """The untouched layer in the mode that the model is in: an int8 layer computes otherwise while it trains."""
        return self.untouched.train(self.model.training)

    def adapters(self, *names: str, mask: torch.Tensor | None = None) -> list[Adapter]:
        return [adapter_of(self.layer, name, mask) for name in names or ("default",)]

    def dense(self) -> nn.Module:
        """The base in float64."""
        return dense_base(self.base, self.row).requires_grad_(False)

    def check_output(self, y: torch.Tensor, *names: str, what: str = "output") -> None:
        """An output of the named adapters is as good as plain PyTorch's, and has the base layer's dtype."""
        assert y.dtype == self.base(self.x).dtype, (
            f"{what}: {y.dtype}, and the base layer gives {self.base(self.x).dtype}"
        )
        with torch.no_grad():
            plain, truth = self.plain_and_truth(*names)
        assert_as_good_as(y, plain, truth, what)

    def plain_and_truth(self, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
        dense = self.dense()
        wide = [adapter.to(torch.float64) for adapter in self.adapters(*names)]
        truth = output(dense, dense.weight, wide, _wide(self.x))
        return output(self.base, self.plain_weight(), self.adapters(*names), self.x), truth

    def plain_weight(self) -> torch.Tensor:
        """The base weight as plain PyTorch in the row's precision reads it."""
        return self.dense().weight.to(self.row.form.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().requires_grad_() if x.is_floating_point() else x


def rig(row: Row, device: str = "cpu", names: tuple[str, ...] = ("default",), **options: Any) -> Rig:
    """A row's model with adapters away from their starting values, the first one active."""
    more = {key: options.pop(key) for key in ("autocast_adapter_dtype",) if key in options}
    wrapped = row.layer.model(row.form, device)
    untouched = copy.deepcopy(wrapped.body).requires_grad_(False)
    model = get_peft_model(wrapped, LoraConfig(**row.options(**options)), names[0], **more)
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**row.options(**options, r=2 * row.layer.rank)))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    for name in names:
        disturb(layer, name)
    return Rig(row, model, layer, untouched, row.layer.input(row.form, device))


def disturb(layer: LoraLayer, name: str) -> None:
    """Move an adapter away from its starting values; magnitudes between half and twice what they were."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for label, tensor in adapter_of(layer, name).leaves().items():
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            if label == "magnitude":
                tensor.mul_(0.5 + 1.5 * noise)
            else:
                tensor.copy_((noise - 0.5) * (0.6 if label == "A" else 1.0))


def fix_dropout(rig: Rig, name: str = "default") -> torch.Tensor:
    """Give an adapter a dropout whose mask is known, and return the mask."""
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(rig.x.shape, generator=generator) >= DROPOUT
    mask = (keep / (1 - DROPOUT)).to(rig.x.device)
    assert isinstance(rig.layer.lora_dropout[name], nn.Dropout)
    rig.layer.lora_dropout[name] = FixedDropout(mask)
    return mask


def check_training(rig: Rig, mask: torch.Tensor | None = None) -> None:
    """Output and every gradient of a training pass are as good as plain PyTorch's in the same precision."""
    rig.model.train()
    y = rig.model(rig.x)
    assert y.dtype == rig.base(rig.x).dtype, f"output in {y.dtype}, and the base layer gives {rig.base(rig.x).dtype}"
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    y.backward(direction)
    leaves = rig.adapters()[0].leaves()
    ours = {name: tensor.grad for name, tensor in leaves.items()}
    missing = [name for name, grad in ours.items() if grad is None]
    assert not missing, f"no gradient of {missing}"
    assert all(grad.dtype == leaves[name].dtype for name, grad in ours.items())
    ours["y"] = y
    if rig.x.is_floating_point():
        ours["x"] = rig.x.grad
    plain = _pass(rig, rig.base, rig.plain_weight(), rig.adapters(mask=mask)[0].to(leaves["A"].dtype), direction)
    dense = rig.dense()
    truth = _pass(rig, dense, dense.weight, rig.adapters(mask=mask)[0].to(torch.float64), direction.double())
    for name, value in ours.items():
        what = "output" if name == "y" else f"gradient of {name}"
        assert_as_good_as(value, plain[name], truth[name], what)
    assert all(parameter.grad is None for parameter in rig.layer.get_base_layer().parameters())


def _pass(
    rig: Rig, base: nn.Module, weight: torch.Tensor, adapter: Adapter, direction: torch.Tensor
) -> dict[str, torch.Tensor]:
    x = rig.x.detach().clone()
    if x.is_floating_point():
        x = x.to(direction.dtype).requires_grad_()
    y = output(base, weight, [adapter], x)
    y.backward(direction.to(y))
    grads = {name: tensor.grad for name, tensor in adapter.leaves().items()}
    return {**grads, "y": y, "x": x.grad}


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors that a layer would save, quantisation state included."""
    return {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key, value in ours.items() if not same_bits(value, theirs[key])]
    assert not different, f"changed: {different}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; of a tensor subclass, those of its parts."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        return torch.cat([_bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]])
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
