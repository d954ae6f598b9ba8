# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every adapted layer has: named adapter slots around a frozen base layer, and which of them are active."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from peft.utils.warning import PeftWarning
from peft.weights import find_weight

from .devices import move_slot_to_base_layer


class Changes:
    """How often any layer's adapters changed: while the number stands, all are as they were."""

    number = 0


class BaseTunerLayer(ABC):
    """Mixin of a layer that wraps `base_layer` and holds one slot of parameters for each adapter.

    Slots are real containers (`nn.ModuleDict`, `nn.ParameterDict`, dict) listed in `adapter_layer_names` (trainable
    state) and `other_param_names` (settings), keyed by the adapter's name, so that other packages can read and write
    them. Every change of slots or of activation goes through `_replan`, so that a forward pass can reuse what it
    found out before.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    frozen_peft_weight_names: dict = {}
    quantization_backend = None
    frozen_biases: tuple[str, ...] = ()  # parameters of the base layer that no `bias` setting trains

    _run_name: str | None = None  # the method that calls with nothing but `x` run, once it was chosen
    _changes = 0  # how often `_replan` was called: what a compiler made is good for one count
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str] = []

    # ---- the base layer ------------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped module, also where several tuners wrap one another."""
        module = self
        while (inner := getattr(module, "base_layer", None)) is not None:
            module = inner
        return module

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight in its own orientation, dequantised where it is stored packed."""
        base_layer = self.get_base_layer()
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(base_layer)
        weight = find_weight(base_layer)
        return weight.dense() if weight.lossy else base_layer.weight

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Store a weight given in the base layer's own orientation, requantising where the format needs it."""
        base_layer = self.get_base_layer()
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight_data)
            return
        weight = find_weight(base_layer)
        if weight.lossy:
            weight.write(weight_data)
        else:
            base_layer.weight.data = weight_data.to(base_layer.weight.dtype)
        self._replan()

    @property
    def weight(self) -> torch.Tensor:
        base_layer = self.get_base_layer()
        packed = next((name for name in ("qweight", "W_q") if hasattr(base_layer, name)), "weight")
        return getattr(base_layer, packed)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.get_base_layer().bias

    # ---- slots ---------------------------------------------------------------------------------------------------
    def _slots(self) -> Iterable[tuple[str, Any]]:
        for attribute in self.adapter_layer_names:
            yield attribute, getattr(self, attribute)

    def _all_available_adapter_names(self) -> list[str]:
        """Names of the adapters that have parameters or settings here, sorted."""
        names: set[str] = set()
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, attribute, None)
            if hasattr(container, "keys"):
                names.update(container.keys())
        return sorted(names)

    def _get_available_adapters(self) -> set[str]:
        return set(self._all_available_adapter_names())

    def _slot_parameters(self, name: str) -> Iterable[torch.Tensor]:
        for _, slot in self._slots():
            if name not in slot:
                continue
            entry = slot[name]
            if isinstance(entry, nn.Module):
                yield from entry.parameters()
            else:
                yield entry

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's parameters and settings; if it was the only active one, another takes its place.

        Args:
            adapter_name: Adapter to remove; unknown names are ignored, as a model's layers need not all have it.

        Raises:
            ValueError: The adapter is merged into the base weight and could no longer be taken out.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Adapter {adapter_name!r} is merged into the base weight; call unmerge() (or model.unmerge_adapter()) "
                "before deleting it, or merge_and_unload() to keep the merged weight."
            )
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, attribute)
            if hasattr(container, "keys") and adapter_name in container:
                del container[adapter_name]
        if adapter_name in self.active_adapters:
            remaining = [name for name in self.active_adapters if name != adapter_name]
            if not remaining:
                available = self._all_available_adapter_names()
                if available:
                    remaining = available[:1]
                    warnings.warn(
                        f"Adapter {adapter_name!r} was active and is deleted; {available[0]!r} is active now.",
                        PeftWarning,
                        stacklevel=2,
                    )
            self.set_adapter(remaining)
        self._replan()

    # ---- activation ----------------------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether any adapter is folded into the base weight."""
        return len(self.merged_adapters) > 0

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are switched off."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        active = self.active_adapter
        return [active] if isinstance(active, str) else active

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of this layer on or off; gradients of the active ones follow."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for attribute in self.adapter_layer_names:
                getattr(self, attribute).requires_grad_(False)
        self._disable_adapters = not enabled
        self._replan()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the named adapters the active ones and, unless `inference_mode`, the only trainable ones.

        Args:
            adapter_names: One name or several; several add up.
            inference_mode: Leave the activated adapters frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for attribute, slot in self._slots():
            for name, entry in slot.items():
                _set_entry_grad(entry, name in names and not inference_mode and not self._is_frozen(attribute, name))
        self._active_adapter = names
        self._replan()

    def _is_frozen(self, attribute: str, name: str) -> bool:
        """Whether a slot stays frozen even while its adapter trains."""
        return name in self.frozen_peft_weight_names.get(attribute, ())

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of the named adapters' parameters without changing which are active."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for _, slot in self._slots():
            for name, entry in slot.items():
                if name in names:
                    _set_entry_grad(entry, requires_grad)

    # ---- merging: the interface; AdapterLayer does it ------------------------------------------------------------
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no merge(): its method cannot be folded into a weight.")

    def unmerge(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no unmerge(): nothing was ever merged here.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether this adapter's update of the weight can be written as a LoRA adapter."""
        return False

    # ---- plumbing ------------------------------------------------------------------------------------------------
    def _replan(self) -> None:
        """Forget what the forward pass worked out; it is worked out again when it is next needed."""
        self.__dict__["_run"] = self.__dict__["_run_name"] = None
        self.__dict__["_changes"] = self._changes + 1
        Changes.number += 1

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put a new adapter where the base weight is, in the base weight's dtype if that can hold gradients."""
        move_slot_to_base_layer(self, adapter_name, device)
        self._replan()

    def _cast_input_dtype(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Cast an input to the adapter's dtype unless `disable_input_dtype_casting` switched that off."""
        if x is None or x.dtype == dtype or not getattr(self, "cast_input_dtype_enabled", True):
            return x
        return x.to(dtype=dtype)


def _set_entry_grad(entry: nn.Module | torch.Tensor, requires_grad: bool) -> None:
    for tensor in entry.parameters() if isinstance(entry, nn.Module) else (entry,):
        if tensor.requires_grad != requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_(requires_grad)


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters that a call of `merge` is to fold in: the named or the active ones, less those already merged.

    Raises:
        ValueError: `adapter_names` is a string.
    """
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names must be a list of names, got the string {adapter_names!r}: pass a list.")
    names = list(module.active_adapters if adapter_names is None else adapter_names)
    if module.merged:
        merged = set(module.merged_adapters)
        names = [name for name in names if name not in merged]
        if names:
            warnings.warn(
                f"Already merged: {', '.join(module.merged_adapters)}. Merging in addition: {', '.join(names)}.",
                PeftWarning,
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters asked for are merged already, nothing to do.", PeftWarning, stacklevel=3)
    return names
