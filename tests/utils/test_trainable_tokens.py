# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Trainable tokens, as a method of their own and beside LoRA."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Toy, llama, t5

from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper


def _layer(base: nn.Module | None = None, **adapters: list[int]) -> TrainableTokensLayer:
    """A layer whose adapters' rows differ from the base's by random numbers; the first one is active."""
    base = nn.Embedding(10, 4) if base is None else base
    names = list(adapters) or ["a"]
    layer = TrainableTokensLayer(base, names[0])
    for name, tokens in (adapters or {"a": [1, 5]}).items():
        layer.update_layer(name, token_indices=tokens)
    with torch.no_grad():
        for delta in layer.trainable_tokens_delta.values():
            delta.add_(torch.randn_like(delta))
    return layer


def _weight_with_rows(layer: TrainableTokensLayer, *names: str) -> torch.Tensor:
    """The definition: the base weight with the rows replaced, as a leaf's copy that carries gradients."""
    weight = layer.get_base_layer().weight.detach().clone()
    for name in names:
        weight = weight.index_copy(0, torch.tensor(layer.token_indices[name]), layer.trainable_tokens_delta[name])
    return weight


IDS = torch.tensor([[1, 5, 2, 1], [0, 9, 5, 5]])


def test_layer_starts_as_the_embedding():
    base = nn.Embedding(10, 4)
    layer = TrainableTokensLayer(base, "a", token_indices=[1, 5])
    assert len(layer.trainable_tokens_delta) == 0
    layer.update_layer("a", token_indices=[1, 5], init_weights=True)
    assert torch.equal(layer.trainable_tokens_delta["a"], base.weight[[1, 5]])
    assert torch.equal(layer.trainable_tokens_original["a"], base.weight[[1, 5]])
    assert torch.equal(layer(IDS), base(IDS))
    assert (layer.in_features, layer.out_features) == (10, 4)
    assert set(layer.state_dict()) == {"base_layer.weight", "trainable_tokens_delta.a"}


def test_random_start():
    layer = TrainableTokensLayer(nn.Embedding(2000, 16, _weight=torch.full((2000, 16), 7.0)), "a")
    layer.update_layer("a", TrainableTokensConfig(token_indices=list(range(2000)), init_weights=False))
    rows = layer.trainable_tokens_delta["a"]
    assert abs(rows.mean()) < 0.05
    assert abs(rows.std() - 1) < 0.05


@pytest.mark.parametrize("options", [{}, {"padding_idx": 5}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_embedding_forward_and_gradients(options):
    layer = _layer(nn.Embedding(10, 4, **options), a=[1, 5], b=[9])
    layer.set_adapter(["a", "b"])
    weight = _weight_with_rows(layer, "a", "b").double()
    truth = F.embedding(IDS, weight, **options)
    y = layer(IDS)
    torch.testing.assert_close(y.double(), truth)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, list(layer.trainable_tokens_delta.values()), dy)
    expected = torch.autograd.grad(truth, list(layer.trainable_tokens_delta.values()), dy.double())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_forward_and_gradients(bias):
    layer = _layer(nn.Linear(4, 10, bias=bias), a=[1, 5], b=[9])
    layer.set_adapter(["a", "b"])
    x = torch.randn(2, 3, 4, requires_grad=True)
    truth = F.linear(x, _weight_with_rows(layer, "a", "b"), layer.base_layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(y)
    leaves = [x, *layer.trainable_tokens_delta.values()]
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, leaves, dy), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_output_keeps_its_dtype():
    layer = _layer(nn.Embedding(10, 4).to(torch.bfloat16))
    layer.trainable_tokens_delta["a"].data = layer.trainable_tokens_delta["a"].data.float()
    y = layer(IDS)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[0, 0], layer.trainable_tokens_delta["a"][0].to(torch.bfloat16))


def test_scaled_embeddings():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    layer = _layer(Scaled(10, 4))
    torch.testing.assert_close(layer(IDS), 3 * F.embedding(IDS, _weight_with_rows(layer, "a")))


def test_a_token_listed_twice_takes_its_last_row():
    layer = _layer(a=[1, 5, 1])
    y = layer(torch.tensor([1, 5]))
    assert torch.equal(y, layer.trainable_tokens_delta["a"][[2, 1]])
    layer.merge()
    assert torch.equal(layer.base_layer.weight[[1, 5]], layer.trainable_tokens_delta["a"][[2, 1]])


def test_adapters_must_not_share_tokens():
    layer = _layer(a=[1, 5], b=[5])
    layer.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="'a' and 'b' both train the token 5"):
        layer(IDS)
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="both train the token 5"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == []


@pytest.mark.parametrize("tokens", [[10], [-1], [1, 99]])
def test_tokens_outside_the_vocabulary(tokens):
    with pytest.raises(ValueError, match="0 to 9.*resize_token_embeddings"):
        _layer(a=tokens)


def test_refusals():
    with pytest.raises(TypeError, match="not of a Conv1d"):
        TrainableTokensLayer(nn.Conv1d(2, 2, 1), "a")
    with pytest.raises(ValueError, match="token_indices is missing"):
        TrainableTokensLayer(nn.Embedding(2, 2), "a").update_layer("a")
    with pytest.raises(TypeError, match="token_indices='x' must be a list of integers"):
        TrainableTokensConfig(token_indices="x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_its_undoing(dtype):
    layer = _layer(nn.Embedding(10, 4).to(dtype), a=[1, 5], b=[9])
    parameter, before = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    adapted = layer.forward_adapters(IDS, ["a", "b"])
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="Merging in addition: b"):
        layer.merge(adapter_names=["a", "b"])
    assert layer.merged_adapters == ["a", "b"]
    assert layer.base_layer.weight is parameter
    assert torch.equal(layer(IDS), adapted)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == []
    with pytest.warns(UserWarning, match="nothing to undo"):
        layer.unmerge()


def test_rows_changed_after_the_adapter_was_made_come_back():
    layer = _layer()
    with torch.no_grad():
        layer.base_layer.weight.fill_(3)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, torch.full((10, 4), 3.0))


def test_safe_merge():
    layer = _layer()
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.trainable_tokens_delta["a"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_disabling_takes_a_merged_adapter_out():
    layer = _layer()
    plain = layer.base_layer(IDS)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(IDS), plain)
    assert not layer.merged


def test_mixed_batch():
    layer = _layer(a=[1, 5], b=[5, 9])
    y = layer(torch.stack([IDS[0], IDS[0], IDS[1]]), adapter_names=["b", "__base__", "a"])
    assert torch.equal(y[0], F.embedding(IDS[0], _weight_with_rows(layer, "b")))
    assert torch.equal(y[1], layer.base_layer(IDS[0]))
    assert torch.equal(y[2], F.embedding(IDS[1], _weight_with_rows(layer, "a")))
    with pytest.raises(ValueError, match="1 entries for a batch of 2"):
        layer(IDS, adapter_names=["a"])
    layer.merge()
    with pytest.raises(ValueError, match="while adapters are merged"):
        layer(IDS, adapter_names=["a", "b"])


def test_quantised_output_layer():
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    packed = base.weight.data.clone()
    layer = _layer(base, a=[1, 5])
    x = torch.randn(2, 64)
    y = layer(x)
    torch.testing.assert_close(y[:, [1, 5]], x @ layer.trainable_tokens_delta["a"].T + base.bias[[1, 5]])
    torch.testing.assert_close(y[:, 6:], base(x)[:, 6:])
    layer.merge()
    assert not torch.equal(base.weight.data, packed)
    layer.unmerge()
    assert torch.equal(base.weight.data, packed)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_duplicates(duplicate):
    layer = _layer()
    y = layer(IDS)
    other = duplicate(layer)
    assert torch.equal(other(IDS), y)
    with torch.no_grad():
        other.trainable_tokens_delta["a"].zero_()
    assert torch.equal(layer(IDS), y)


def test_no_copy_of_the_vocabulary_is_made():
    layer = _layer(nn.Embedding(4096, 8).requires_grad_(False), a=[1, 5])
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    layer(IDS)
    with Watch():
        layer(IDS).sum().backward()
    assert 0 < largest <= IDS.numel() * 8 * 4


# ---- the method ----------------------------------------------------------------------------------------------------
def _random_rows(layer: TrainableTokensLayer) -> None:
    with torch.no_grad():
        for delta in layer.trainable_tokens_delta.values():
            delta.add_(torch.randn_like(delta))


def test_default_target_is_the_input_embedding():
    model = get_peft_model(Toy(), TrainableTokensConfig(token_indices=[1]))
    assert isinstance(model.base_model.model.emb, TrainableTokensLayer)
    assert model.peft_config["default"].target_modules == "emb"
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["base_model.model.emb.trainable_tokens_delta.default"]


@pytest.mark.parametrize("build", [llama, t5])
def test_tied_layers_share_rows(build):
    base = llama(tied=True) if build is llama else t5()
    model = get_peft_model(base, TrainableTokensConfig(token_indices=[1, 3]))
    model.add_adapter("second", TrainableTokensConfig(token_indices=[3, 4]))
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    assert len(layers) == (2 if build is llama else 4)
    assert len({id(layer.trainable_tokens_delta) for layer in layers}) == 1
    _random_rows(layers[0])
    ids = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    if build is t5:
        ids["decoder_input_ids"] = torch.tensor([[0, 3, 1]])
    first = model(**ids).logits
    model.set_adapter("second")
    second = model(**ids).logits
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        plain = model(**ids).logits
    weight = base.get_input_embeddings().base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(**ids).logits, first)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
    with model.disable_adapter():
        assert torch.equal(model(**ids).logits, plain)
    model.delete_adapter("default")
    torch.testing.assert_close(model(**ids).logits, second)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**ids).logits, second)
    assert merged.get_input_embeddings().weight is merged.lm_head.weight is weight
    assert not any(isinstance(module, TrainableTokensLayer) for module in merged.modules())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load(tmp_path, tied, low_cpu_mem_usage):
    base = llama(tied)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, TrainableTokensConfig(token_indices=[1, 3]))
    _random_rows(base.model.embed_tokens)
    ids = torch.tensor([[1, 2, 3]])
    y = model(ids).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    fresh = llama(tied)
    fresh.load_state_dict(state)
    again = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(again(ids).logits, y)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, y)


def test_only_the_rows_are_trained():
    model = get_peft_model(Toy(), TrainableTokensConfig(token_indices=[1, 5]))
    layer = model.base_model.model.emb
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"base_model.model.emb.trainable_tokens_delta.default"}
    assert not torch.equal(layer.get_merged_weights(["default"])[1], layer.base_layer.weight[1])


def test_mixed_batch_in_a_model():
    model = get_peft_model(Toy(), TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 5])).eval()
    model.add_adapter("other", TrainableTokensConfig(target_modules=["emb"], token_indices=[5]))
    _random_rows(model.base_model.model.emb)
    y = model(IDS, adapter_names=["other", "default"])
    torch.testing.assert_close(y[1:], model(IDS[1:]))
    model.set_adapter("other")
    torch.testing.assert_close(y[:1], model(IDS[:1]))


# ---- beside LoRA ---------------------------------------------------------------------------------------------------
def _lora(tokens, **kwargs):
    return LoraConfig(target_modules=["body"], trainable_token_indices=tokens, init_lora_weights=False, **kwargs)


def test_beside_lora():
    base = Toy()
    model = get_peft_model(base, _lora([1, 5]))
    wrapper = base.emb
    assert isinstance(wrapper, TrainableTokensWrapper)
    assert wrapper.original_module is wrapper.token_adapter.base_layer
    assert wrapper.num_embeddings == 10
    assert torch.equal(wrapper.weight, wrapper.token_adapter.get_merged_weights(["default"]))
    _random_rows(wrapper.token_adapter)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        "base_model.model.emb.token_adapter.trainable_tokens_delta.default",
        "base_model.model.body.lora_A.default.weight",
        "base_model.model.body.lora_B.default.weight",
    }
    y = model(IDS)
    assert torch.equal(wrapper(IDS), wrapper.token_adapter(IDS))
    with model.disable_adapter():
        assert torch.equal(wrapper(IDS), wrapper.original_module(IDS))
        assert torch.equal(wrapper.weight, wrapper.original_module.weight)
    torch.testing.assert_close(model(IDS), y)
    merged = model.merge_and_unload()
    assert type(merged.emb) is nn.Embedding
    torch.testing.assert_close(merged(IDS), y)


def test_unloading_gives_the_embedding_back():
    base = Toy()
    weight = base.emb.weight.detach().clone()
    model = get_peft_model(base, _lora([1, 5]))
    _random_rows(base.emb.token_adapter)
    model.merge_adapter()
    assert not torch.equal(base.emb.original_module.weight, weight)
    assert torch.equal(model.unload().emb.weight, weight)


def test_second_adapter_and_deletion():
    base = Toy()
    model = get_peft_model(base, _lora([1, 5]))
    model.add_adapter("b", _lora({"emb": [5, 7]}))
    _random_rows(base.emb.token_adapter)
    assert base.emb.active_adapters == ["default"]
    assert not base.emb.token_adapter.trainable_tokens_delta["b"].requires_grad
    model.set_adapter("b")
    assert base.emb.token_adapter.active_adapters == ["b"]
    torch.testing.assert_close(base.emb(IDS), F.embedding(IDS, _weight_with_rows(base.emb.token_adapter, "b")))
    y = model(IDS)
    model.delete_adapter("default")
    assert list(base.emb.token_adapter.trainable_tokens_original) == ["b"]
    torch.testing.assert_close(model(IDS), y)
    model.delete_adapter("b")
    assert base.emb.active_adapters == []
    assert torch.equal(base.emb(IDS), base.emb.original_module(IDS))


def test_mixed_batch_beside_lora():
    model = get_peft_model(Toy(), _lora([1, 5])).eval()
    model.add_adapter("b", _lora([5]))
    model.add_adapter("c", LoraConfig(target_modules=["body"], init_lora_weights=False))
    _random_rows(model.base_model.model.emb.token_adapter)
    ids = IDS[[0, 0, 0, 0]]
    y = model(ids, adapter_names=["default", "b", "c", "__base__"])
    for row, name in enumerate(["default", "b", "c"]):
        model.set_adapter(name)
        torch.testing.assert_close(y[row : row + 1], model(ids[:1]))
    with model.disable_adapter():
        torch.testing.assert_close(y[3:], model(ids[:1]))


def test_tied_beside_lora(tmp_path):
    base = llama(tied=True)
    config = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[1, 3])
    model = get_peft_model(base, config)
    embedding, head = base.model.embed_tokens, base.lm_head
    assert isinstance(head, TrainableTokensWrapper)
    assert head.token_adapter.tied_adapter is embedding.token_adapter
    assert head.adapter_state_dict("default", head.state_dict()) == head.adapter_state_dict_load_map("default") == {}
    _random_rows(embedding.token_adapter)
    ids = torch.tensor([[1, 2, 3]])
    y = model(ids).logits
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert not torch.allclose(model(ids).logits, y)
    model.set_adapter("default")
    torch.testing.assert_close(model(ids).logits, y)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    state = {key.replace("token_adapter.base_layer.", ""): value for key, value in base.state_dict().items()}
    fresh = llama(tied=True)
    fresh.load_state_dict({key.replace(".base_layer", ""): value for key, value in state.items()}, strict=False)
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path)(ids).logits, y)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(ids).logits, y)


def test_untied_layers_are_left_alone():
    base = llama()
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[1]))
    assert isinstance(base.lm_head, nn.Linear)


def test_tied_layers_with_tokens_of_their_own():
    def wrap(**kwargs):
        base = llama(tied=True)
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **kwargs))
        return base

    base = wrap(trainable_token_indices={"embed_tokens": [1], "lm_head": [1]})
    assert base.lm_head.token_adapter.tied_adapter is base.model.embed_tokens.token_adapter
    base = wrap(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]})
    assert base.lm_head.token_adapter.tied_adapter is None
    base = wrap(trainable_token_indices={"lm_head": [2]})
    assert isinstance(base.model.embed_tokens, nn.Embedding)
    base = wrap(trainable_token_indices={"lm_head": [2]}, ensure_weight_tying=True)
    assert base.lm_head.token_adapter.tied_adapter is base.model.embed_tokens.token_adapter
    with pytest.raises(ValueError, match="different tokens"):
        wrap(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True)


def test_conflicting_settings():
    with pytest.raises(ValueError, match="modules_to_save='emb' trains this module whole"):
        get_peft_model(Toy(), _lora([1], modules_to_save=["emb"]))
    with pytest.raises(TypeError, match="trainable_token_indices names a module"):
        get_peft_model(Toy(), LoraConfig(target_modules=["emb"], trainable_token_indices=[1]))
    with pytest.raises(ValueError, match="no module called 'nothing'"):
        get_peft_model(Toy(), _lora({"nothing": [1]}))
    model = get_peft_model(Toy(), _lora([1]))
    with pytest.raises(TypeError, match="trainable_token_indices of another adapter"):
        model.add_adapter("whole", LoraConfig(target_modules=["body"], modules_to_save=["emb"]))


def test_without_a_peft_model():
    base = Toy()
    inject_adapter_in_model(_lora([1, 5]), base)
    loaded = base.emb.adapter_state_dict_load_map("default")
    assert loaded == {
        "token_adapter.trainable_tokens_delta": "token_adapter.trainable_tokens_delta.default",
    }
    assert set(loaded.values()) <= set(base.emb.state_dict())


def test_half_precision_rows_train_in_float32():
    base = llama(dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[1]))
    assert base.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].dtype == torch.float32
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
