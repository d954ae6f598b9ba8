# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Models with a head for a task: its new layers are trained in full and saved with the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.config import PeftConfig

from .task import TaskModel

CLASSIFIER_HEADS = ("classifier", "score")


class _PeftModelWithHead(TaskModel):
    """A model whose head is added to `modules_to_save` of every adapter."""

    head_names: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, self._with_head(peft_config), adapter_name, **kwargs)

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype:
        bool = True,
    ) -> None:  # fmt: skip
        """Create a further adapter, the head included. Arguments and errors as in `PeftModel.add_adapter`."""
        super().add_adapter(adapter_name, self._with_head(peft_config), low_cpu_mem_usage, autocast_adapter_dtype)

    def _with_head(self, config: PeftConfig) -> PeftConfig:
        """The config itself, the head's names added once: a saved config has them already."""
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *self.head_names]))
        return config


class PeftModelForSequenceClassification(_PeftModelWithHead):
    """A sequence classifier with adapters. Arguments as in `PeftModel`.

    Modules called "classifier" or "score" are trained in full.
    """

    head_names = CLASSIFIER_HEADS

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with adapters.

        Args:
            input_ids: Token ids `[batch, length]`.
            attention_mask: `[batch, length]`.
            inputs_embeds: Embeddings `[batch, length, dim]` in place of `input_ids`.
            labels: Classes `[batch]` to compute the loss for.
            output_attentions, output_hidden_states, return_dict: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
            **kwargs: For the base model, except `adapter_names`, see `PeftModel.forward`.
        """
        return self._call(
            kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip


class PeftModelForTokenClassification(_PeftModelWithHead):
    """A token classifier with adapters. Arguments as in `PeftModel`.

    Modules called "classifier" or "score" are trained in full.
    """

    head_names = CLASSIFIER_HEADS

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        if peft_config is None:
            raise ValueError("peft_config=None: give the config of the first adapter.")
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with adapters.

        Args:
            input_ids: Token ids `[batch, length]`.
            attention_mask: `[batch, length]`.
            inputs_embeds: Embeddings `[batch, length, dim]` in place of `input_ids`.
            labels: Classes `[batch, length]` to compute the loss for.
            output_attentions, output_hidden_states, return_dict: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
            **kwargs: For the base model, except `adapter_names`, see `PeftModel.forward`.
        """
        return self._call(
            kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip


class PeftModelForQuestionAnswering(_PeftModelWithHead):
    """A model that finds answers in a text, with adapters. Arguments as in `PeftModel`.

    The module called "qa_outputs" is trained in full.
    """

    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with adapters.

        Args:
            input_ids: Token ids `[batch, length]`.
            attention_mask, token_type_ids, position_ids: `[batch, length]`.
            inputs_embeds: Embeddings `[batch, length, dim]` in place of `input_ids`.
            start_positions, end_positions: Where the answers are, `[batch]`, to compute the loss for.
            output_attentions, output_hidden_states, return_dict: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
            **kwargs: For the base model, except `adapter_names`, see `PeftModel.forward`.
        """
        # not every architecture takes these two
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        kwargs.update({key: value for key, value in optional.items() if value is not None})
        return self._call(
            kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            start_positions=start_positions, end_positions=end_positions, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip


class PeftModelForFeatureExtraction(TaskModel):
    """A model that embeds its input, with adapters. Arguments as in `PeftModel`."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with adapters.

        Args:
            input_ids: Token ids `[batch, length]`.
            attention_mask: `[batch, length]`.
            inputs_embeds: Embeddings `[batch, length, dim]` in place of `input_ids`.
            output_attentions, output_hidden_states, return_dict: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
            **kwargs: For the base model, except `adapter_names`, see `PeftModel.forward`.
        """
        return self._call(
            kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip
