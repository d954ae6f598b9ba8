# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The config of prefix tuning. TRL imports its class to tell it from others; the method itself is not in this package,
and `get_peft_model` says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.config import PromptLearningConfig
from peft.utils.peft_types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """The config of prefix tuning (Li and Liang, arXiv 2101.00190), to be read and compared.

    Args:
        init_weights: "zero" to start from a prefix that changes nothing, None for random values.
        encoder_hidden_size: Width of the projection's hidden layer.
        prefix_projection: Compute the prefix by a projection of two layers.
    """

    init_weights: Literal["zero"] | None = field(default=None, metadata={"help": "How the prefix starts."})
    encoder_hidden_size: int = field(default=None, metadata={"help": "Hidden width of the projection."})
    prefix_projection: bool = field(default=False, metadata={"help": "Compute the prefix by a projection."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
