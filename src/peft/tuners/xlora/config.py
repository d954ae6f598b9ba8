# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The config of X-LoRA."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME
from peft.utils.peft_types import PeftType


@dataclass
class XLoraConfig(PeftConfig):
    """Which experts there are, and how a classifier weighs them.

    Args:
        hidden_size: Size of the base model's hidden states.
        adapters: Folders or repositories of the experts by name; the classifier takes them in the order of their names.
        enable_softmax: Turn the classifier's logits into weights that add up to 1.
        enable_softmax_topk: Do so among the `top_k_lora` experts of a token once more.
        layerwise_scalings: Give each layer weights of its own.
        xlora_depth: Linear layers of the classifier.
        xlora_size: Size of its hidden layers.
        xlora_dropout_p: Dropout between them.
        use_trainable_adapters: Train the experts too.
        softmax_temperature: Temperature of the softmax.
        top_k_lora: Leave all but so many experts of each token out; None for none.
        scaling_pass_value: Weight of every expert in the pass that the classifier's input comes from.
        global_scaling_weight: Factor of all weights.
    """

    hidden_size: int = field(default=None, metadata={"help": "Size of the base model's hidden states."})
    adapters: dict[str, str] = field(default=None, metadata={"help": "Where the experts are, by name."})
    enable_softmax: bool = field(default=True, metadata={"help": "Weights add up to 1."})
    enable_softmax_topk: bool = field(default=False, metadata={"help": "So do those of the top_k_lora experts."})
    layerwise_scalings: bool = field(default=False, metadata={"help": "Each layer has its own weights."})
    xlora_depth: int = field(default=1, metadata={"help": "Linear layers of the classifier."})
    xlora_size: int = field(default=2048, metadata={"help": "Size of its hidden layers."})
    xlora_dropout_p: float = field(default=0.2, metadata={"help": "Dropout between them."})
    use_trainable_adapters: bool = field(default=False, metadata={"help": "Train the experts too."})
    softmax_temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax."})
    top_k_lora: int | None = field(default=None, metadata={"help": "Experts that a token uses; None for all."})
    scaling_pass_value: float = field(default=0.0, metadata={"help": "Experts' weight in the classifier's pass."})
    global_scaling_weight: float = field(default=1.0, metadata={"help": "Factor of all weights."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        if self.hidden_size is None:
            warnings.warn("hidden_size is not set; 4096 is taken. It is the base model's hidden size.", stacklevel=3)
            self.hidden_size = 4096
        if self.adapters is None:
            warnings.warn(
                "adapters is not set: there is nothing to weigh. Give paths of experts by name.", stacklevel=3
            )
            self.adapters = {}
        # files keep no order of names, and the classifier's outputs count on one
        self.adapters = dict(sorted(self.adapters.items()))
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("enable_softmax_topk=True has no effect without top_k_lora.", stacklevel=3)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "enable_softmax_topk=True takes a softmax of what enable_softmax=True made weights of already.",
                stacklevel=3,
            )
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warnings.warn(f"top_k_lora={self.top_k_lora} must be at least 1: no expert would be used.", stacklevel=3)

    def found_in(self, folder: str | os.PathLike) -> None:
        """Take the experts that were saved with the classifier in a folder from there, as training may have changed
        them."""
        for name in self.adapters:
            if os.path.isfile(os.path.join(folder, name, CONFIG_NAME)):
                self.adapters[name] = os.path.join(folder, name)
