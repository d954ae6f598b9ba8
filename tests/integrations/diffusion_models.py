# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A pipeline around a tiny UNet and one around a tiny diffusion transformer, both fed with embeddings of prompts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}


def unet_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **BLOCKS)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False, **nothing
    )


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
    options = {"num_inference_steps": steps, "output_type": "latent", "height": 8, "width": 8, "generator": noise}
    return pipeline(prompt_embeds=prompt, **given, **options).images
