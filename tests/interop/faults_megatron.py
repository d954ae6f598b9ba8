# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on Megatron's parallel layers in one process: with megatron-core where it is installed, and otherwise with the
stand-in of tests/lora, which is built to its documented interface. tests/lora/test_megatron_layers.py runs two ranks."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from recipes import evaluated, fill, recipe
from torch import distributed, nn

import peft

_STAND_IN = str(Path(__file__).resolve().parents[1] / "lora" / "fake_megatron")
_SETTINGS = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "use_cpu_initialization": True}


@contextmanager
def _one_rank() -> Iterator[None]:
    """Megatron with a group of this process alone; the stand-in is forgotten afterwards."""
    stands_in = importlib.util.find_spec("megatron") is None
    if stands_in:
        sys.path.append(_STAND_IN)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            from megatron.core import parallel_state

            parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
            yield
        finally:
            distributed.destroy_process_group()
            if stands_in:
                sys.path.remove(_STAND_IN)
                for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
                    del sys.modules[name]
            else:
                parallel_state.destroy_model_parallel()


class _Parallel(nn.Module):
    """A column-parallel layer before a row-parallel one; each gives an output and a bias."""

    def __init__(self) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.transformer_config import TransformerConfig

        torch.manual_seed(0)
        common = {"config": TransformerConfig(**_SETTINGS), "init_method": nn.init.xavier_normal_, "bias": True}
        self.up = ColumnParallelLinear(8, 12, gather_output=False, skip_bias_add=False, **common)
        self.down = RowParallelLinear(12, 6, input_is_parallel=True, skip_bias_add=True, **common)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = self.down(torch.tanh(self.up(x)[0]))
        return y + bias


@recipe
def on_megatron(use_dora: bool = False) -> float:
    """How far adapters on parallel layers, trained, saved, loaded and merged, are from the same in a new model."""
    with _one_rank(), tempfile.TemporaryDirectory() as folder:
        x = torch.linspace(-1, 1, 80).reshape(5, 2, 8)  # [sequence, batch, features]
        config = peft.LoraConfig(
            r=2, target_modules=["up", "down"], megatron_config=dict(_SETTINGS), use_dora=use_dora
        )
        model = peft.get_peft_model(_Parallel(), config)
        fill(model)
        y = model(x)
        y.sum().backward()
        assert all(bool(p.grad.any()) for name, p in model.named_parameters() if "lora_" in name)
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(_Parallel(), folder)
        with evaluated(model), evaluated(loaded):
            reread = loaded(x)
            model.merge_adapter()
            return max((other - y).abs().max().item() for other in (reread, model(x)))
