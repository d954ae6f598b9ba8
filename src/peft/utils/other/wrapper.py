# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What `modules_to_save` and `trainable_token_indices` share: a wrapper that stands in a model for one of its modules
and runs, for each adapter, that adapter's version of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn


class AuxiliaryTrainingWrapper(nn.Module):
    """Stands for `original_module` in a model and holds one trainable version of it for each adapter.

    Without an active adapter, or with adapters disabled, it computes what the original does. Attributes that it lacks
    are those of the version in use.

    Args:
        module_to_save: Module to wrap; it is kept as it is and frozen.
        adapter_name: First adapter; it becomes the active one.
        **kwargs: Handed to `init_modules` and `update`.

    Raises:
        TypeError: A module of this kind cannot be wrapped.
    """

    # Dotted paths of the containers, keyed by adapter, of trainable state and of settings.
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: list[str] = []

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: list[str] = [adapter_name]
        self._disable_adapters = False
        self.check_module()
        for parameter in module_to_save.parameters():
            parameter.requires_grad_(False)
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)

    # ---- what a kind of wrapper answers --------------------------------------------------------------------------
    def check_module(self) -> None:
        """Raise a TypeError for modules that cannot be wrapped."""
        from peft.engine.layer import BaseTunerLayer

        refused = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
        module = self.original_module
        for name, part in module.named_modules():  # a copy of an adapter within could not be saved
            if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                where = f" in {name}" if name else ""
                raise TypeError(
                    f"{self._error_message_name()} names a module with an adapter already ({type(part).__name__}{where}): "
                    "leave it out of target_modules, or of the other setting."
                )
        if isinstance(module, refused):
            raise TypeError(
                f"{self._error_message_name()} names a {type(module).__name__}, which has no forward of its own: name "
                "the modules in it."
            )

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Create the containers of the adapters' versions. Called once."""
        raise NotImplementedError(f"{type(self).__name__} must say in init_modules where it keeps its adapters.")

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Create the version of one more adapter; one that is there already is left alone."""
        raise NotImplementedError(f"{type(self).__name__} must say in update how an adapter is added.")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that takes the wrapper's place when adapters are unloaded.

        Args:
            merge: Return the adapted module instead of the original.
            safe_merge: Refuse adapted weights that are not finite.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: Adapters cannot be merged together, or `safe_merge` found NaN or infinity.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it is unloaded.")

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Keys as they are saved and, for each, the key in this module's state dict."""
        raise NotImplementedError(f"{type(self).__name__} must say how its adapters are saved.")

    def _error_message_name(self) -> str:
        """What users call this wrapper, for error messages."""
        return type(self).__name__

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have a version here."""
        return {name for container in self._containers() for name in container}

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the version of the active adapter."""
        raise NotImplementedError(f"{type(self).__name__} must say how it runs an adapter.")

    def _forward_wrapped_mixed_batch(
        self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run the version of `active_adapter` on the rows that are its own."""
        raise NotImplementedError(f"{type(self).__name__} must say how it runs an adapter.")

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the original."""
        return self.original_module(*args, **kwargs)

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        """Whether `_getattr_wrapped` has an answer: false while the wrapper is being built."""
        return False

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        """An attribute of the version in use."""
        raise AttributeError(name)

    # ---- adapters ------------------------------------------------------------------------------------------------
    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter[0] if len(self._active_adapter) == 1 else self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """Which of the named adapters, of which only one may have a version here, would become active.

        Raises:
            ValueError: No name is given, or several of them have a version here.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("adapter_name is empty: name at least one adapter to set.")
        known = [name for name in adapter_name if name in self._get_available_adapters()]
        if len(known) > 1:
            raise ValueError(
                f"{self._error_message_name()} can have one active adapter at a time, got {', '.join(known)}: set one "
                "of them."
            )
        return known[0] if known else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones and, unless `inference_mode`, the only trainable ones; none for an empty list.

        Raises:
            ValueError: An adapter has no version here.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        available = self._get_available_adapters()
        unknown = [name for name in names if name not in available]
        if unknown:
            raise ValueError(
                f"{self._error_message_name()} has no adapter {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(map(repr, sorted(available))) or 'none'}."
            )
        for name in available:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or thaw the named adapters without changing which are active; unknown names are skipped."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for container in self._containers():
            for name in names:
                if name not in container:
                    continue
                entry = container[name]
                for tensor in entry.parameters() if isinstance(entry, nn.Module) else (entry,):
                    if tensor.is_floating_point() or tensor.is_complex():
                        tensor.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; gradients of the active ones follow."""
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            self.set_requires_grad(sorted(self._get_available_adapters()), False)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter's version; unknown names are ignored.

        Args:
            adapter_name: Adapter to remove.
            new_active_adapters: Adapters that are active in the rest of the model afterwards: if the removed one was
                active here, those of them that have a version here take its place.
        """
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = attrgetter(attribute)(self)
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in self._active_adapter:
            available = self._get_available_adapters()
            self.set_adapter([name for name in new_active_adapters or () if name in available])

    def adapter_state_dict(
        self, adapter_name: str, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of one adapter under the keys they are saved with.

        Args:
            adapter_name: Adapter to pick; one without a version here gives an empty dict.
            state_dict: State dict of this wrapper, or None to take it now.

        Raises:
            KeyError: `state_dict` lacks a tensor of the adapter.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {saved: state_dict[live] for saved, live in self.adapter_state_dict_load_map(adapter_name).items()}

    def _containers(self) -> Iterator[nn.Module]:
        for attribute in self.adapter_layer_names:
            yield attrgetter(attribute)(self)

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the version in use.

        Args:
            *args: Arguments of the original module.
            **kwargs: Arguments of the original module and, for a batch whose rows use different adapters,
                `adapter_names`, one name a row; rows whose adapter has no version here use the original.

        Raises:
            ValueError: `adapter_names` and the batch differ in length.
            TypeError: The module cannot be run row by row.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if self._disable_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        if adapter_names is not None:
            return self._forward_by_rows(adapter_names, args, kwargs)
        if not self._active_adapter:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        return self._forward_wrapped(*args, **kwargs)

    def _forward_by_rows(
        self, adapter_names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run each adapter on its rows and put the results together in the order of the batch."""
        x, args, kwargs = self._split_input(args, kwargs)
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name a row, "
                "'__base__' for rows without an adapter."
            )
        self._check_runs_by_rows((*args, *kwargs.values()))
        available = self._get_available_adapters()
        groups: dict[str | None, list[int]] = {}
        for row, name in enumerate(adapter_names):
            groups.setdefault(name if name in available else None, []).append(row)
        result = None
        for name, rows in groups.items():
            index = torch.tensor(rows, device=x.device)
            if name is None:
                y = self._forward_wrapped_passthrough(x[index], *args, **kwargs)
            else:
                y = self._forward_wrapped_mixed_batch(x[index], name, *args, **kwargs)
            if not isinstance(y, torch.Tensor) or len(y) != len(rows):
                raise TypeError(
                    f"adapter_names cannot be used with {type(self.original_module).__name__} in "
                    f"{self._error_message_name()}: its output is not a tensor with one entry a row."
                )
            if result is None:
                result = y.new_empty((len(x), *y.shape[1:]))
            result = result.index_copy(0, index.to(y.device), y.to(result.dtype))
        return result

    def _split_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
        """The batch, which may be given by keyword, and the other arguments of a call."""
        if args:
            return args[0], args[1:], kwargs
        first = next(iter(inspect.signature(self.original_module.forward).parameters))
        if first not in kwargs:
            raise TypeError(f"The first argument, {first!r}, is missing.")
        return kwargs[first], (), {name: value for name, value in kwargs.items() if name != first}

    def _check_runs_by_rows(self, others: Iterable[Any]) -> None:
        module = self.original_module
        batch_norm = nn.modules.batchnorm._BatchNorm
        if self.training and any(isinstance(part, batch_norm) for part in module.modules()):
            raise TypeError(
                f"adapter_names cannot be used with {type(module).__name__} in {self._error_message_name()}: its "
                "batch normalisation mixes rows while training. Call model.eval() first."
            )
        if any(isinstance(value, torch.Tensor) for value in others):
            raise TypeError(
                f"adapter_names cannot be used with {type(module).__name__} in {self._error_message_name()}: it takes "
                "more than one tensor, and which of them have rows is not known."
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if not self._hasattr_wrapped(name, modules):
                raise
        return self._getattr_wrapped(name, modules)
