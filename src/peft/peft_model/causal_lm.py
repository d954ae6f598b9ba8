# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`PeftModelForCausalLM`."""

from __future__ import annotations

from typing import Any

import torch

from .task import GeneratingModel


class PeftModelForCausalLM(GeneratingModel):
    """A causal language model with adapters. Arguments as in `PeftModel`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import LoraConfig, PeftModelForCausalLM
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> model = PeftModelForCausalLM(base, LoraConfig(task_type="CAUSAL_LM", r=2))
        >>> model.active_adapter
        'default'
    """

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
            labels: Token ids `[batch, length]` to compute the loss for.
            output_attentions, output_hidden_states, return_dict: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
            **kwargs: For the base model, except `adapter_names`, see `PeftModel.forward`.
        """
        return self._call(
            kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip
