# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Activated LoRA (Greenewald et al., arXiv 2504.12397): the adapter acts from its invocation tokens on, not before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .additive import AdditiveVariant

if TYPE_CHECKING:
    from peft.config import PeftConfig

    from ..layer.base import LoraLayer


class ALoraLinearVariant(AdditiveVariant):
    """aLoRA on linear layers: of each row, the last `alora_offsets[row]` tokens get the adapter's update."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Nothing beyond A and B."""

    def why_not_foldable(self, layer: LoraLayer, name: str) -> str | None:
        return "it is an aLoRA adapter (alora_invocation_tokens), which leaves the tokens before its invocation alone."

    def supports_lora_conversion(self) -> bool:
        return False  # plain LoRA would act on every token

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As `LoraVariant.forward`, for `x` `[batch, length, in]`.

        Args:
            module: The layer.
            active_adapter: Name of the adapter.
            x: Input `[batch, length, in]`.
            result: Output without the adapter.
            **kwargs: `alora_offsets`, one number a row: how many tokens from the end are the adapter's; None or 0 for
                none. Without it no token is.

        Raises:
            ValueError: The input is not a batch of sequences, or the offsets are not one a row.
        """
        offsets = kwargs.get("alora_offsets", module.__dict__.get("_alora_offsets"))
        if offsets is None:
            return result
        if x.dim() != 3 or len(offsets) != x.shape[0]:
            raise ValueError(
                f"alora_offsets has {len(offsets)} entries for an input {list(x.shape)}: an aLoRA adapter needs inputs "
                "[batch, length, features] and one offset a row."
            )
        length = x.shape[1]
        first = torch.tensor([length - min(offset or 0, length) for offset in offsets], device=x.device)
        acts = torch.arange(length, device=x.device) >= first[:, None]  # [batch, length]
        update = module.low_rank(active_adapter, x, result) * module.scaling[active_adapter]
        return torch.where(acts.unsqueeze(-1), result + update, result)


def calculate_alora_offsets(
    peft_config: dict[str, PeftConfig],
    active_adapter: str,
    input_ids: torch.Tensor,
    adapter_names: list[str] | None = None,
) -> list[int | None]:
    """For each row, how many tokens from the end the last occurrence of the invocation tokens starts.

    Args:
        peft_config: Configs by adapter name.
        active_adapter: The adapter of all rows, unless `adapter_names` is given.
        input_ids: Token ids `[batch, length]`.
        adapter_names: The adapter of each row.

    Returns:
        One number a row; None where the row's adapter is no aLoRA or its tokens do not occur.
    """
    names = [active_adapter] * len(input_ids) if adapter_names is None else adapter_names
    offsets: list[int | None] = []
    for ids, name in zip(input_ids.tolist(), names, strict=True):
        tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        starts = range(len(ids) - len(tokens), -1, -1) if tokens else ()
        start = next((start for start in starts if ids[start : start + len(tokens)] == list(tokens)), None)
        offsets.append(None if start is None else len(ids) - start)
    return offsets


def is_alora_relevant_in_batch(model: nn.Module, adapter_names: list[str] | None = None) -> bool:
    """Whether an adapter of the batch, or an active one where no names are given, is an aLoRA adapter."""
    names = model.active_adapters if adapter_names is None else adapter_names
    return any(getattr(model.peft_config.get(name), "alora_invocation_tokens", None) for name in names)


def get_alora_offsets_for_forward(
    model: nn.Module,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """A forward call's keyword arguments, with `alora_offsets` where an aLoRA adapter needs it and it is not given.

    Args:
        model: Model with adapters.
        input_ids: Token ids `[batch, length]`.
        inputs_embeds: Embeddings in their place; the invocation cannot be found in them.
        **kwargs: The call's other arguments, `adapter_names` among them.
    """
    names = kwargs.get("adapter_names")
    if "alora_offsets" in kwargs or not is_alora_relevant_in_batch(model, names):
        return kwargs
    if input_ids is None:
        if inputs_embeds is not None:
            warnings.warn(
                "aLoRA finds its invocation tokens in input_ids; with inputs_embeds alone the adapter is off. Pass "
                "alora_offsets to switch it on.",
                stacklevel=2,
            )
        return {**kwargs, "alora_offsets": None}
    return {**kwargs, "alora_offsets": _offsets(model, input_ids, names)}


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The keyword arguments of `generate`, with `alora_offsets` for the prompt where an aLoRA adapter needs it."""
    names = kwargs.get("adapter_names")
    if "alora_offsets" in kwargs or not is_alora_relevant_in_batch(model, names):
        return kwargs
    input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if input_ids is None:
        warnings.warn(
            "aLoRA finds its invocation tokens in input_ids, which generate was not given; the adapter is off.",
            stacklevel=2,
        )
        return {**kwargs, "alora_offsets": None}
    return {**kwargs, "alora_offsets": _offsets(model, input_ids, names)}


@contextmanager
def alora_offsets_hooks(model: nn.Module, layers: Iterable[LoraLayer], offsets: list[int | None]) -> Iterator[None]:
    """Give LoRA layers `alora_offsets` as a keyword argument for as long as the context is open.

    Under gradient checkpointing they also remember them until the next call, for the forward pass that backward runs
    again: a batch's backward pass has to come before the next batch's forward pass.
    """
    layers = list(layers)
    again = model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        rows = len(args[0]) if args else len(offsets)
        repeats = rows // len(offsets) if rows % len(offsets) == 0 else 1  # beam search: each row repeated in place
        return args, {**kwargs, "alora_offsets": [offset for offset in offsets for _ in range(repeats)]}

    with ExitStack() as stack:
        for layer in layers:
            layer.__dict__["_alora_offsets"] = offsets if again else None
            stack.callback(layer.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        yield


def _offsets(model: nn.Module, input_ids: torch.Tensor, names: list[str] | None) -> list[int | None]:
    active = next(iter(model.active_adapters), None)
    return calculate_alora_offsets(model.peft_config, active, input_ids, names)
