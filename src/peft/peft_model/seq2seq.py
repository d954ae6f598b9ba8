# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`PeftModelForSeq2SeqLM`."""

from __future__ import annotations

from typing import Any

import torch

from .task import GeneratingModel


class PeftModelForSeq2SeqLM(GeneratingModel):
    """A sequence-to-sequence language model with adapters. Arguments as in `PeftModel`."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with adapters.

        Args:
            input_ids: Token ids `[batch, length]` of the encoder.
            attention_mask: `[batch, length]`.
            inputs_embeds: Embeddings `[batch, length, dim]` in place of `input_ids`.
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds: The same for the decoder.
            labels: Token ids `[batch, target length]` to compute the loss for.
            output_attentions, output_hidden_states, return_dict: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
            **kwargs: For the base model, except `adapter_names`, see `PeftModel.forward`.
        """
        return self._call(
            kwargs, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds, labels=labels, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip

    def generate(self, **kwargs: Any) -> Any:
        """The base model's `generate` with adapters. Arguments as in `PeftModel.forward`."""
        return super().generate(**kwargs)
