# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The config of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Which rows of which embedding are trained.

    Args:
        token_indices: Numbers of the tokens whose rows are trained.
        target_modules: Names of the embeddings (or ends of names), or one regular expression; None for the model's
            input embedding. Layers that share the input embedding's weight use its trained rows too.
        init_weights: Start from the rows as they are; if not, from a standard normal distribution.

    Raises:
        TypeError: `token_indices` is not a list of integers.
    """

    # rows of tied layers are always shared
    ensure_weight_tying: ClassVar[bool] = True
    # a few rows are trained, so the base embedding need not be saved with them
    adapts_whole_embeddings: ClassVar[bool] = False

    token_indices: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of the tokens whose rows are trained."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Embeddings: names, ends of names, or a regular expression; None for the input embedding."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start from the rows as they are; if not, from a standard normal distribution."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS
        indices = self.token_indices
        if not isinstance(indices, (list, tuple)) or not all(isinstance(index, int) for index in indices):
            raise TypeError(
                f"token_indices={indices!r} must be a list of integers, the numbers of the tokens to train."
            )
