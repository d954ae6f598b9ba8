# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`trainable_token_indices`: rows of an embedding that are trained beside an adapter of another method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .wrapper import AuxiliaryTrainingWrapper

if TYPE_CHECKING:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Holds trainable rows of an embedding, or of the output layer tied to it, for each adapter.

    Args:
        module_to_save: Embedding or linear layer; it is kept as it is and frozen.
        adapter_name: First adapter; it becomes the active one.
        token_indices: Numbers of the rows to train.
        tied_adapter: Layer of the tied module whose rows are used here too.

    Raises:
        TypeError: The module is neither an embedding nor linear, or covered by an adapter already.
        ValueError: A token index lies outside the vocabulary.
    """

    __module__ = "peft.utils.other"  # the path in pickles and logs

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: list[int],
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.get_base_layer()

    def check_module(self) -> None:
        from peft.engine.layer import BaseTunerLayer

        module = self._modules["original_module"]
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise TypeError(
                "trainable_token_indices names a module that an adapter covers already "
                f"({type(module).__name__}): leave it out of target_modules and modules_to_save, or name another."
            )

    def init_modules(
        self, adapter_name: str, token_indices: list[int], tied_adapter: TrainableTokensLayer | None
    ) -> None:
        from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

        # the token layer takes the module over: registered twice, it would be saved twice
        base_layer = self._modules.pop("original_module")
        self.token_adapter = TrainableTokensLayer(
            base_layer, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter
        )

    def update(self, active_adapter: str, **kwargs: Any) -> None:
        """Create an adapter's rows, trainable if the adapter is active; rows that are there already are left alone.

        Args:
            active_adapter: Adapter to add.
            **kwargs: `token_indices` and, for a tied layer, `tied_adapter`.
        """
        if active_adapter not in self.token_adapter.token_indices:
            self.token_adapter.update_layer(active_adapter, **kwargs)
        self.set_requires_grad(active_adapter, active_adapter in self._active_adapter and not self._disable_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.token_adapter.set_adapter(self._active_adapter, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        if adapter_name in self.token_adapter.merged_adapters:
            self.token_adapter.unmerge()
        super().delete_adapter(adapter_name, new_active_adapters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.token_adapter.merged:
            self.token_adapter.unmerge()
        return self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        # rows shared with a tied module are saved there
        if self.token_adapter.tied_adapter is not None or adapter_name not in self.token_adapter.token_indices:
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    def _error_message_name(self) -> str:
        return "trainable_token_indices"

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.token_adapter(*args, **kwargs)

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.token_adapter.merged:
            self.token_adapter.unmerge()
        return self.original_module(*args, **kwargs)

    def _forward_wrapped_mixed_batch(
        self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return self.token_adapter.forward_adapters(x, [active_adapter], *args, **kwargs)

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return "token_adapter" in modules

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        layer = modules["token_adapter"]
        if name == "weight" and not (self._disable_adapters or layer.merged):
            return layer.get_merged_weights(self._active_adapter)
        return getattr(layer.get_base_layer(), name)
