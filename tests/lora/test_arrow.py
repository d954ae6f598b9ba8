# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Arrow: prototypes, which experts a token gets, general knowledge taken out, experts that come and go, refusals."""

import pytest
import torch
from torch import nn

from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

X = torch.randn(3, 5, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 6)
        self.table = nn.Embedding(4, 8)

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for i in range(5):
        torch.manual_seed(i + 1)
        config = LoraConfig(r=2, lora_alpha=i + 1, target_modules=["body"], init_lora_weights=False)
        get_peft_model(Net(), config).save_pretrained(folder / str(i))
    return [str(folder / str(i)) for i in range(5)]


def save(folder, **options):
    config = LoraConfig(**{"r": 2, "target_modules": ["body"], "init_lora_weights": False, **options})
    get_peft_model(Net(), config).save_pretrained(folder)
    return str(folder)


def reference(model, names, top_k, temperature, general=()):
    layer = model.base_model.model.body
    factors = {n: (layer.lora_A[n].weight, layer.lora_B[n].weight) for n in (*names, *general)}
    means = [torch.stack([factors[n][i] for n in general]).mean(0) if general else 0.0 for i in (0, 1)]
    deltas = [(factors[n][1] - means[1]) @ (factors[n][0] - means[0]) for n in names]
    prototypes = torch.stack([torch.linalg.svd(delta).Vh[0] for delta in deltas])
    scores = (X @ prototypes.t()).abs() / temperature
    y = layer.base_layer(X)
    for row in range(X.shape[0]):
        for token in range(X.shape[1]):
            best = scores[row, token].argsort(descending=True)[:top_k]
            for weight, k in zip(scores[row, token, best].softmax(0), best.tolist(), strict=True):
                y[row, token] += weight * layer.scaling[names[k]] * deltas[k] @ X[row, token]
    return y


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("use_gks", [False, True])
@torch.no_grad()
def test_tokens_weigh_the_experts_that_their_direction_chooses(top_k, use_gks, experts):
    config = ArrowConfig(top_k=top_k, router_temperature=0.5, use_gks=use_gks)
    model = create_arrow_model(Net(), experts[:3], config, experts[3:])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [f"task_{i}" for i in range(3)]
    expected = reference(model, names, top_k, 0.5, ["gks_0", "gks_1"] if use_gks else [])
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(model(X[0]), expected[0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not model.training and model.active_adapters == ["arrow_router"]


@torch.no_grad()
def test_experts_come_change_and_go(experts):
    model = create_arrow_model(Net(), experts[:2], ArrowConfig(top_k=2))
    model.load_adapter(experts[2], "task_2")
    torch.testing.assert_close(model(X), reference(model, ["task_0", "task_1", "task_2"], 2, 1.0))
    model.base_model.model.body.lora_A["task_1"].weight.mul_(-3).add_(1)
    torch.testing.assert_close(model(X), reference(model, ["task_0", "task_1", "task_2"], 2, 1.0))
    model.delete_adapter("task_0")
    torch.testing.assert_close(model(X), reference(model, ["task_1", "task_2"], 2, 1.0))
    model.delete_adapter("arrow_router")
    assert not model.base_model.model.body.lora_arrow


def test_one_batch_mixes_the_router_and_an_expert(experts):
    model = create_arrow_model(Net(), experts[:3], ArrowConfig(top_k=2))
    y = model(X)
    mixed = model(X, adapter_names=["arrow_router", "task_1", "__base__"])
    torch.testing.assert_close(mixed[0], y[0])
    torch.testing.assert_close(mixed[2], Net()(X)[2])
    model.set_adapter("task_1")
    torch.testing.assert_close(mixed[1], model(X)[1])


def test_a_router_is_not_merged_and_is_no_lora(experts):
    model = create_arrow_model(Net(), experts[:3], ArrowConfig(top_k=2))
    with pytest.raises(RuntimeError, match="router"):
        model.merge_adapter()
    assert not model.base_model.supports_lora_conversion("arrow_router")


def test_a_saved_router_knows_its_experts(experts, tmp_path):
    model = create_arrow_model(Net(), experts[:3], ArrowConfig(top_k=2))
    model.save_pretrained(tmp_path)
    names = ["task_0", "task_1", "task_2", "arrow_router"]
    again = PeftModel.from_pretrained(Net(), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        again.load_adapter(tmp_path / name, name)
    again.set_adapter("arrow_router")
    assert again.peft_config["arrow_router"].arrow_config.task_adapter_names == names[:3]
    torch.testing.assert_close(again.eval()(X), model(X))


def test_the_direction_is_the_first_right_singular_vector():
    a, b = torch.randn(3, 8), torch.randn(6, 3)
    found = ArrowLoraLinearLayer(8, ArrowConfig()).top_right_singular_vec_from_BA(a, b)
    torch.testing.assert_close(found.abs(), torch.linalg.svd(b @ a).Vh[0].abs(), rtol=1e-4, atol=1e-5)


def test_refusals(experts, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        create_arrow_model(Net(), [], ArrowConfig())
    with pytest.raises(ValueError, match="general_adapter_paths"):
        create_arrow_model(Net(), experts[:2], ArrowConfig(use_gks=True))
    for folder, options, error in (
        ("rank", {"r": 3}, "rank 3"),
        ("dora", {"use_dora": True}, "plain LoRA"),
        ("more", {"target_modules": ["table"]}, "Embedding"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            create_arrow_model(Net(), [experts[0], save(tmp_path / folder, **options)], ArrowConfig(top_k=1))
    with pytest.raises(ValueError, match="top_k=3"):
        create_arrow_model(Net(), experts[:2], ArrowConfig(top_k=3))(X)
    config = LoraConfig(r=2, target_modules=["body"], arrow_config=ArrowConfig())
    with pytest.raises(ValueError, match="needs experts"):
        get_peft_model(Net(), config)(X)
