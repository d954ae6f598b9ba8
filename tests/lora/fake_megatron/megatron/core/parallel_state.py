# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`megatron.core.parallel_state`: one group of all ranks."""

from torch import distributed


def initialize_model_parallel(tensor_model_parallel_size: int = 1) -> None:
    assert tensor_model_parallel_size == distributed.get_world_size()


def get_tensor_model_parallel_group() -> distributed.ProcessGroup:
    return distributed.group.WORLD
