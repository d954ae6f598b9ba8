# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A pipeline around a tiny UNet, the example's, and one around a tiny diffusion transformer, both fed with embeddings."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "diffusion_dora" / "diffusion_dora.py"
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
unet_pipeline = runpy.run_path(str(EXAMPLE))["smoke_pipeline"]


def dit_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    sizes = {"block_out_channels": (4,), "norm_num_groups": 1, "latent_channels": 1}
    vae = AutoencoderKL(**sizes, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, **BLOCKS)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **nothing)


def draw(pipeline: Any, steps: int = 2) -> torch.Tensor:
    """The latents of a picture, the same ones at every call with the same weights."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 5, 16, generator=noise)
    if isinstance(pipeline, FluxPipeline):
        given = {"pooled_prompt_embeds": torch.randn(1, 8, generator=noise), "max_sequence_length": 48}
    else:
        given = {"negative_prompt_embeds": torch.zeros_like(prompt)}
    side = 8 * pipeline.vae_scale_factor
    options = {"num_inference_steps": steps, "output_type": "latent", "height": side, "width": side}
    return pipeline(prompt_embeds=prompt, generator=noise, **given, **options).images
