# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`modules_to_save`: modules that are trained and saved whole, one copy for each adapter."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from peft.utils.integrations import gather_params_ctx

from .wrapper import AuxiliaryTrainingWrapper

_QUANTISED_PARAMETERS = frozenset(("Params4bit", "Int8Params"))


def _quantised_part(module: nn.Module) -> nn.Module | None:
    """The first module inside that stores its weight packed, which no optimizer can train."""
    for part in module.modules():
        if "qweight" in part._buffers or "qweight" in part._parameters:
            return part
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if type(parameter).__name__ in _QUANTISED_PARAMETERS or type(parameter.data).__module__.startswith(
                "torchao"
            ):
                return part
            if name == "weight" and not (parameter.is_floating_point() or parameter.is_complex()):
                return part
    return None


@contextmanager
def _onloaded(module: nn.Module):
    """Bring the parts that accelerate offloaded in, so that a copy gets their values."""
    hooks = [(part, getattr(part, "_hf_hook", None)) for part in module.modules()]
    offloaded = [(part, hook) for part, hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]
    for part, hook in offloaded:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in offloaded:
            hook.post_forward(part, torch.tensor([]))


def _trainable_copy(module: nn.Module) -> nn.Module:
    """A copy with values of its own, on the device where the original runs and never offloaded."""
    with gather_params_ctx(module.parameters()), _onloaded(module):
        copy = deepcopy(module)
    originals = dict(module.named_modules())
    for name, part in copy.named_modules():
        hook = getattr(originals[name], "_hf_hook", None)
        if hook is None:
            continue
        # a hook belongs to the module it was made for, and the values of an offloading one would be thrown away
        remove_hook_from_module(part)
        if isinstance(hook, AlignDevicesHook):
            device = hook.execution_device
            add_hook_to_module(
                part, AlignDevicesHook(device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
            )
    return copy


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """Holds a trainable copy of a whole module for each adapter; one adapter at a time is active.

    Args:
        module_to_save: Module to copy; it is kept as it is and frozen.
        adapter_name: First adapter; it becomes the active one.
        tied_module: Module whose weight the adapter's copy is to share, for layers that the base model ties.

    Raises:
        TypeError: The module is a bare container, or covered by an adapter already.
        RuntimeError: It is stored quantised.
    """

    __module__ = "peft.utils.other"  # the path in pickles and logs

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module)

    def check_module(self) -> None:
        super().check_module()
        part = _quantised_part(self.original_module)
        if part is not None:
            raise RuntimeError(
                f"modules_to_save names a module with a quantised {type(part).__name__}, which cannot be trained: "
                "load the base model with this module left out of quantisation (such as llm_int8_skip_modules of "
                "BitsAndBytesConfig, modules_to_not_convert elsewhere), or put an adapter on it with target_modules."
            )

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = nn.ModuleDict()

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Create an adapter's copy, trainable if the adapter is active; one that is there already is left alone.

        Args:
            adapter_name: Adapter to add.
            tied_module: Module whose weight the copy is to share.
            **kwargs: Ignored.
        """
        if adapter_name in self.modules_to_save:
            return
        copy = _trainable_copy(self.original_module)
        if tied_module is not None:
            copy.weight = tied_module.weight
        self.modules_to_save[adapter_name] = copy
        self.set_requires_grad(adapter_name, adapter_name in self._active_adapter and not self._disable_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(
                f"modules_to_save can have one active adapter at a time, got {', '.join(adapter_names)}: set one."
            )
        super().set_adapter(adapter_names, inference_mode)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        names = self._active_adapter if adapter_names is None else adapter_names
        name = self.check_set_adapter(names) if merge and names else None
        if name is None:
            return self.original_module
        module = self.modules_to_save[name]
        if safe_merge and not all(parameter.isfinite().all() for parameter in module.parameters()):
            raise ValueError(f"Adapter {name!r} has NaN or infinity in its copy of a module in modules_to_save.")
        return module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.modules_to_save:
            return {}
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def _error_message_name(self) -> str:
        return "modules_to_save"

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.modules_to_save[self._active_adapter[0]](*args, **kwargs)

    def _forward_wrapped_mixed_batch(
        self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return self.modules_to_save[active_adapter](x, *args, **kwargs)

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return "modules_to_save" in modules

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        if self._disable_adapters or not self._active_adapter:
            return getattr(modules["original_module"], name)
        return getattr(modules["modules_to_save"][self._active_adapter[0]], name)
