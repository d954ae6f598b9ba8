# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The tuner of trainable tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import _get_input_embeddings_name, _get_submodules
from peft.utils.other.additional import tied_group

from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer


class TrainableTokensModel(BaseTuner):
    """Trains some rows of a model's embeddings; layers tied to the input embedding use its rows too.

    Arguments as in `BaseTuner`.
    """

    prefix = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer
    supports_weight_tying = True

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool =
        False, **kwargs: Any,
    ) -> None:  # fmt: skip
        # found out before the first layer is replaced, while the model still knows its embedding
        self._tied_group = tied_group(model, self.get_model_config(model))
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = _get_input_embeddings_name(self.model, "embed_tokens")
        return peft_config

    def _create_and_replace(
        self, peft_config: TrainableTokensConfig, adapter_name: str, target: nn.Module, target_name: str, parent:
        nn.Module, current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        layer = self._adapt(peft_config, adapter_name, target, target_name, parent)
        if self._tied_group and current_key == self._tied_group[0]:
            for name in self._tied_group[1:]:
                tied_parent, tied, tied_name = _get_submodules(self.model, name)
                self._adapt(peft_config, adapter_name, tied, tied_name, tied_parent, tied_adapter=layer)

    def _adapt(
        self,
        config: TrainableTokensConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> TrainableTokensLayer:
        if isinstance(target, TrainableTokensLayer):
            layer = target
        else:
            layer = TrainableTokensLayer(target, adapter_name, config, tied_adapter=tied_adapter)
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in layer.token_indices or tied_adapter is not None:
            layer.update_layer(adapter_name, config)
        return layer

    def _check_merge_allowed(self) -> None:
        """Nothing to say: tied layers share their rows, so they stay equal."""
