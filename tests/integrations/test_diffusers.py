# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA in diffusers' pipelines: loaded, weighted, fused and unloaded, on a UNet and on a diffusion transformer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from diffusers import FluxPipeline, StableDiffusionPipeline
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusion_models import dit_pipeline, draw, unet_pipeline

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

pytestmark = pytest.mark.filterwarnings("ignore")
# pipeline, its class, the adapted part, what saving calls it, the layers (convolutions among the UNet's)
KINDS = {
    "unet": (unet_pipeline, StableDiffusionPipeline, "unet", ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]),
    "dit": (dit_pipeline, FluxPipeline, "transformer", ["to_q", "to_v", "to_out.0", "ff.net.2", "proj_mlp"]),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # the latents of the UNet are of the order of ten
ADAPTERS = ("first", "second")


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """A pipeline, its adapted part, the files of two adapters, and what the pipeline draws with each added in place."""
    make, kind, part, targets = KINDS[request.param]
    drawn = {}
    for seed, name in enumerate(ADAPTERS):
        pipeline = make()
        model = getattr(pipeline, part)
        torch.manual_seed(seed)
        options = {"r": 2, "lora_alpha": 4, "use_dora": True, "init_lora_weights": False}
        model.add_adapter(LoraConfig(target_modules=targets, **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        layers = {f"{part}_lora_layers": get_peft_model_state_dict(model)}
        metadata = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
        kind.save_lora_weights(tmp_path / name, **layers, **metadata)
        drawn[name] = draw(pipeline)
    pipeline = make()
    return pipeline, getattr(pipeline, part), tmp_path, drawn


@pytest.mark.works_with(
    "diffusers",
    "`load_lora_weights`, `set_adapters` with weights, `fuse_lora`, `unload_lora_weights` on a UNet and a diffusion transformer",
)
def test_loading_weighting_fusing_and_unloading(made):
    pipeline, model, folder, expected = made
    drawn = {"base": draw(pipeline)}
    for name in ADAPTERS:
        pipeline.load_lora_weights(folder / name, adapter_name=name)
        pipeline.set_adapters(name)
        assert model.peft_config[name].use_dora and model.peft_config[name].lora_alpha == 4
        drawn[name] = draw(pipeline)
        torch.testing.assert_close(drawn[name], expected[name], **CLOSE)
    pipeline.set_adapters(list(ADAPTERS), [0.5, 0.7])
    drawn["both"] = draw(pipeline)
    pipeline.set_adapters(list(ADAPTERS), [0.7, 0.5])
    drawn["otherwise"] = draw(pipeline)
    pictures = list(drawn.values())
    assert not any(torch.allclose(a, b, atol=0.02) for i, a in enumerate(pictures) for b in pictures[:i])

    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), drawn["otherwise"], **CLOSE)
    pipeline.unfuse_lora()
    torch.testing.assert_close(draw(pipeline), drawn["otherwise"], **CLOSE)
    pipeline.disable_lora()
    torch.testing.assert_close(draw(pipeline), drawn["base"], **CLOSE)
    pipeline.enable_lora()
    pipeline.delete_adapters("second")
    pipeline.set_adapters("first")
    torch.testing.assert_close(draw(pipeline), drawn["first"], **CLOSE)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), drawn["base"], **CLOSE)
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_fusing_for_good(made):
    pipeline, model, folder, expected = made
    pipeline.load_lora_weights(folder / "first", adapter_name="first")
    pipeline.fuse_lora(safe_fusing=True)
    pipeline.unload_lora_weights()
    assert not any(hasattr(module, "base_layer") for module in model.modules())
    torch.testing.assert_close(draw(pipeline), expected["first"], **CLOSE)


@pytest.mark.works_with("diffusers", "compiling both")
@pytest.mark.parametrize("made", ["dit", pytest.param("unet", marks=pytest.mark.slow)], indirect=True)
def test_a_compiled_model_draws_the_same(made):
    torch._dynamo.reset()
    pipeline, model, folder, expected = made
    pipeline.load_lora_weights(folder / "first", adapter_name="first")
    model.compile(backend="aot_eager")
    torch.testing.assert_close(draw(pipeline), expected["first"], **CLOSE)


@pytest.mark.works_with("diffusers", "layerwise casting of the base")
def test_the_base_is_kept_in_another_dtype(made):
    """As the page on troubles says: without patterns diffusers imports methods that are not here."""
    pipeline, model, folder, expected = made
    pipeline.load_lora_weights(folder / "first", adapter_name="first")
    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *LoraLayer.adapter_layer_names)
    model.enable_layerwise_casting(torch.bfloat16, torch.float32, skip_modules_pattern=patterns)
    targeted = {name: p.dtype for name, p in model.named_parameters() if "to_q" in name and name.endswith("weight")}
    assert all(
        dtype == (torch.bfloat16 if "base_layer" in name else torch.float32) for name, dtype in targeted.items()
    )
    drawn, scale = draw(pipeline), expected["first"].abs().max()
    assert 0 < (drawn - expected["first"]).abs().max() < 0.02 * scale


@pytest.mark.works_with("diffusers", "training both")
def test_gradients_reach_every_parameter_of_the_adapter(made):
    pipeline, model, folder, _ = made
    pipeline.load_lora_weights(folder / "first", adapter_name="first")
    model.train().requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    if hasattr(model, "conv_in"):
        inputs = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16)}
        y = model(**inputs, timestep=torch.tensor([1, 5])).sample
    else:
        inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 16)}
        inputs |= {
            "pooled_projections": torch.randn(2, 8),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        }
        y = model(**inputs, timestep=torch.tensor([0.1, 0.5])).sample
    y.square().mean().backward()
    assert trained and all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert sum(bool(p.grad.abs().sum() > 0) for p in trained) > 0.9 * len(trained)
