# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What the classes for the tasks share: how they call the base model, and how they generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.config import PeftConfig

from .base import PeftModel


class TaskModel(PeftModel):
    """A `PeftModel` that calls its base model by keywords. Arguments as in `PeftModel`."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _call(self, kwargs: dict[str, Any], **named: Any) -> Any:
        """The forward pass on `kwargs` and the arguments that the task names."""
        kwargs = {**kwargs, **named}
        with self._enable_peft_forward_hooks(**kwargs):
            return self.get_base_model()(**self._without_special_args(kwargs))


class GeneratingModel(TaskModel):
    """A `PeftModel` of a base model that generates text. Arguments as in `PeftModel`."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if hasattr(model, "prepare_inputs_for_generation"):
            self.base_model_prepare_inputs_for_generation = model.prepare_inputs_for_generation

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base model's inputs for the next step of generation.

        Args:
            *args, **kwargs: As in the base model.
            task_ids: For prompt learning over several tasks; not used by adapters in layers.
        """
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)
