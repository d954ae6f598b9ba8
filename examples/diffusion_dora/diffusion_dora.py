# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Teaches a Stable Diffusion pipeline a subject from a few pictures with DoRA on its UNet, and draws with the saved adapter.

python diffusion_dora.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --images dog/ --prompt "a photo of sks dog"
python diffusion_dora.py --smoke        # no network, no GPU: a tiny random pipeline and drawn squares, in seconds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from peft import LoraConfig, get_peft_model_state_dict

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub id or folder of a Stable Diffusion pipeline")
    parser.add_argument("--images", type=Path, help="folder of pictures of the subject")
    parser.add_argument("--prompt", default="a photo of sks thing", help="what the pictures show")
    parser.add_argument("--smoke", action="store_true", help="a tiny pipeline and its own pictures instead")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2, help="pictures a step")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--weight", type=float, default=0.8, help="the adapter's weight in the picture that is drawn")
    parser.add_argument(
        "--output", type=Path, default=Path("diffusion-adapter"), help="folder for adapter and picture"
    )
    arguments = parser.parse_args()
    if arguments.smoke == bool(arguments.model and arguments.images):
        parser.error("give either --smoke, or both --model and --images")
    if arguments.smoke:
        arguments.resolution, arguments.steps, arguments.batch_size, arguments.lr = 32, 60, 8, 3e-3
    return arguments


def smoke_pipeline() -> StableDiffusionPipeline:
    """The shape of Stable Diffusion with random weights and without a text encoder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler()
    return StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing)


def smoke_pictures(size: int) -> torch.Tensor:
    """Bright squares on a dark ground `[8, 3, size, size]`."""
    pictures = torch.full((8, 3, size, size), -0.8)
    for i, picture in enumerate(pictures):
        picture[:, 4 + i : 16 + i, 6 : 18 + i] = 0.8
    return pictures


def load_pictures(folder: Path, size: int) -> torch.Tensor:
    """The pictures of a folder, cut to squares, `[n, 3, size, size]` in -1 to 1."""
    loaded = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            continue
        picture = Image.open(path).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        loaded.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1)
    if not loaded:
        raise FileNotFoundError(f"--images {folder} holds no .png, .jpg, .jpeg or .webp")
    return torch.stack(loaded)


def encode_prompt(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    """Hidden states `[1, tokens, width]`; the tiny pipeline has no text encoder and gets random ones for each length."""
    if pipeline.text_encoder is None:
        noise = torch.Generator().manual_seed(len(prompt))
        return torch.randn(1, 5, pipeline.unet.config.cross_attention_dim, generator=noise)
    return pipeline.encode_prompt(prompt, DEVICE, 1, do_classifier_free_guidance=False)[0]


def train(pipeline: StableDiffusionPipeline, pictures: torch.Tensor, text: torch.Tensor, arguments) -> list[float]:
    """Train the UNet's adapter to predict the noise in noised latents; the losses."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    target_is_noise = scheduler.config.prediction_type == "epsilon"
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures.to(DEVICE, DTYPE)).latent_dist.mean
    latents = (latents * pipeline.vae.config.scaling_factor).float()
    unet = pipeline.unet.train()
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=arguments.lr)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(arguments.steps):
        chosen = torch.randint(len(latents), (arguments.batch_size,), generator=generator)
        clean = latents[chosen.to(DEVICE)]
        noise = torch.randn(clean.shape, generator=generator).to(DEVICE)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator).to(DEVICE)
        noised = scheduler.add_noise(clean, noise, times)
        target = noise if target_is_noise else scheduler.get_velocity(clean, noise, times)
        with torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32):
            predicted = unet(noised.to(DTYPE), times, text.expand(len(clean), -1, -1).to(DTYPE)).sample
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(arguments.steps // 10, 1) == 0:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


def draw(pipeline: StableDiffusionPipeline, prompt: str, size: int, steps: int) -> np.ndarray:
    """A picture `[size, size, 3]` in 0 to 255, the same one at each call with the same weights."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    texts = {"prompt_embeds": encode_prompt(pipeline, prompt), "negative_prompt_embeds": encode_prompt(pipeline, "")}
    options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(1)}
    with torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32):
        return np.asarray(pipeline(**texts, height=size, width=size, **options).images[0], dtype=np.float32)


def load_pipeline(arguments: argparse.Namespace) -> StableDiffusionPipeline:
    if arguments.smoke:
        return smoke_pipeline()
    return StableDiffusionPipeline.from_pretrained(arguments.model, torch_dtype=DTYPE).to(DEVICE)


def main() -> None:
    arguments = parse_arguments()
    pipeline = load_pipeline(arguments)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        if part is not None:
            part.requires_grad_(False)
    torch.manual_seed(0)
    settings = {"use_dora": True, "use_dora_triton": DEVICE == "cuda", "target_modules": TARGETS}
    pipeline.unet.add_adapter(LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, **settings))
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    text = encode_prompt(pipeline, arguments.prompt)
    size = arguments.resolution
    pictures = smoke_pictures(size) if arguments.smoke else load_pictures(arguments.images, size)
    losses = train(pipeline, pictures, text, arguments)
    part = max(len(losses) // 6, 1)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    print(f"loss {first:.4f} -> {last:.4f}")
    if arguments.smoke and not last < first:
        raise AssertionError("the loss did not fall")

    StableDiffusionPipeline.save_lora_weights(
        arguments.output,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    check(pipeline, arguments)


def check(pipeline: StableDiffusionPipeline, arguments: argparse.Namespace) -> None:
    """Draw with the trained adapter, with the saved one in a fresh pipeline, at its weight, and fused at that weight."""
    settings = arguments.prompt, arguments.resolution, 4 if arguments.smoke else 30
    trained = draw(pipeline, *settings)
    fresh = load_pipeline(arguments)
    fresh.load_lora_weights(arguments.output, adapter_name="subject")
    fresh.set_adapters("subject", 1.0)
    apart = np.abs(draw(fresh, *settings) - trained).max()
    print(f"reloaded from {arguments.output}: pictures {apart:.0f} of 255 apart")
    fresh.set_adapters("subject", arguments.weight)
    weighted = draw(fresh, *settings)
    Image.fromarray(weighted.astype(np.uint8)).save(arguments.output / "picture.png")
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    fused = np.abs(draw(fresh, *settings) - weighted).max()
    print(
        f"fused at weight {arguments.weight}: pictures {fused:.0f} of 255 apart; see {arguments.output / 'picture.png'}"
    )
    if arguments.smoke and max(apart, fused) > 1:
        raise AssertionError("the saved or the fused adapter draws another picture than the trained one")


if __name__ == "__main__":
    main()
