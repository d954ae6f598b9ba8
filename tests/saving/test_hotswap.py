# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One adapter in the place of another, in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def adapted(seed: int = 1, **settings) -> PeftModel:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **settings}
    model = get_peft_model(net(), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def swap(model: nn.Module, other: PeftModel) -> None:
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("ranks", [(2, 2), (4, 2), (2, 4)], ids=str)
def test_the_output_is_the_new_adapters(tmp_path, extra, ranks):
    model, other = adapted(r=ranks[0], **extra), adapted(2, r=ranks[1], lora_alpha=7, **extra)
    model(X)  # whatever is reused between calls must notice
    parameters = [id(parameter) for parameter in model.parameters()]
    swap(model, other)
    torch.testing.assert_close(model(X), other(X))
    assert [id(parameter) for parameter in model.parameters()] == parameters
    model.save_pretrained(tmp_path)  # as small as the new adapter, and with its settings
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert loaded.base_model.model[0].lora_A["default"].weight.shape[0] == ranks[1]
    torch.testing.assert_close(loaded(X), other(X))
    model.load_adapter(tmp_path, "default")  # and back into the larger room
    torch.testing.assert_close(model(X), other(X))


def test_names_in_memory_do_as_well():
    model, other = adapted(use_dora=True), adapted(2, use_dora=True)
    state = {key: value for key, value in other.state_dict().items() if "lora_" in key}
    hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    torch.testing.assert_close(model(X), other(X))


def test_dora_notices_a_new_scaling_of_the_same_factors():
    model = adapted(use_dora=True)
    prepare_model_for_compiled_hotswap(model)
    model(X)
    other = adapted(use_dora=True, lora_alpha=9)
    swap(model, other)
    torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_the_new_adapter_leaves_alone_do_nothing(dora):
    model, other = adapted(use_dora=dora), adapted(2, use_dora=dora, target_modules=["0"])
    swap(model, other)
    torch.testing.assert_close(model(X), other(X))


def test_patterns():
    settings = {"rank_pattern": {"0": 3}, "alpha_pattern": {"2": 9}}
    model, other = adapted(r=4, alpha_pattern={"2": 9}), adapted(2, **settings)
    swap(model, other)
    torch.testing.assert_close(model(X), other(X))


def test_from_a_folder(tmp_path):
    model, other = adapted(), adapted(2, lora_alpha=9)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(model(X), other(X))
    with pytest.raises(RuntimeError, match="'nope'"):
        hotswap_adapter(model, str(tmp_path), "nope")


# ---- refused before anything is changed ----------------------------------------------------------------------------
def broken(change) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(adapted(2))
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (lambda state: state.pop("base_model.model.2.lora_B.weight"), RuntimeError, r"lora_B\.weight of .*2"),
        (lambda state: state.update({"base_model.model.9.lora_A.weight": torch.zeros(2, 5)}), RuntimeError, "9"),
        (lambda state: state.update({"base_model.model.2.lora_A.weight": torch.zeros(2, 9)}), ValueError, r"\[2, 9\]"),
        (lambda state: state.update({"base_model.model.2.lora_A.weight": torch.zeros(3, 8)}), ValueError, r"\[3, 8\]"),
    ],
    ids=["missing", "unknown", "shape", "rank unlike the config's"],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(state, error, message):
    model = adapted()
    before, output = snapshot(model), model(X)
    with pytest.raises(error, match=message):
        hotswap_adapter_from_state_dict(model, broken(state), "default", LoraConfig(r=2, lora_alpha=4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), output)


def test_merged_and_unknown_adapters_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="'nope'"):
        hotswap_adapter_from_state_dict(model, {}, "nope", LoraConfig())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        swap(model, adapted(2))


def test_configs_that_do_not_go_together():
    check_hotswap_configs_compatible(LoraConfig(), LoraConfig(r=3, lora_alpha=3, bias="all"))
    different = {"use_rslora": True, "lora_dropout": 0.1, "alpha_pattern": {"a": 1}, "use_dora": True}
    for name, value in different.items():
        with pytest.raises(ValueError, match=name):
            check_hotswap_configs_compatible(LoraConfig(), LoraConfig(**{name: value}))
    tokens = TrainableTokensConfig(token_indices=[1])
    with pytest.raises(ValueError, match="TRAINABLE_TOKENS"):
        check_hotswap_configs_compatible(LoraConfig(), tokens)
    with pytest.raises(ValueError, match="TRAINABLE_TOKENS"):
        check_hotswap_configs_compatible(tokens, tokens)


# ---- compiled models -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dora", [False, True])
def test_preparing_makes_room_and_changes_no_output(tmp_path, dora):
    model = adapted(use_dora=dora)
    expected = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config["default"])
    layer = model.base_model.model[0]
    assert isinstance(layer.scaling["default"], float if dora else torch.Tensor)
    assert layer.lora_A["default"].weight.shape == (6, 5) and layer.lora_B["default"].weight.shape == (8, 6)
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(ValueError, match="target_rank=3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(X), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_no_recompilation(dora):
    count = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        count.append(1)
        return graph.forward

    torch._dynamo.reset()
    model = adapted(use_dora=dora)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    scaling = model.base_model.model[0].scaling["default"]
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(X)
        graphs = len(count)
        for seed, settings in (
            (2, {"r": 4, "lora_alpha": 8 if dora else 9}),
            (3, {"r": 1, "lora_alpha": 2 if dora else 3}),
        ):
            other = adapted(seed, use_dora=dora, **settings)
            swap(compiled, other)
            torch.testing.assert_close(compiled(X), other(X))
    assert len(count) == graphs
    assert dora or model.base_model.model[0].scaling["default"] is scaling
    with pytest.raises(ValueError, match="target_rank=5"):
        swap(compiled, adapted(4, use_dora=dora, r=5))
    torch._dynamo.reset()


def test_what_to_do_about_a_compiled_model():
    with pytest.raises(ValueError, match="check_compiled='ignore'"):
        prepare_model_for_compiled_hotswap(torch.compile(adapted()), target_rank=4)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(torch.compile(adapted()), target_rank=4, check_compiled="warn")
    with pytest.raises(ValueError, match="check_compiled='x'"):
        prepare_model_for_compiled_hotswap(adapted(), check_compiled="x")
    with pytest.raises(ValueError, match="no LoRA layers"):
        prepare_model_for_compiled_hotswap(net(), target_rank=4)
