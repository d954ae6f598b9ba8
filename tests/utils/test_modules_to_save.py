# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`modules_to_save`: copies, activation, mixed batches, deletion, tying, refusals."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from toys import Toy, llama

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, set_additional_trainable_modules
from peft.utils.other import _freeze_adapter, _set_adapter, _set_trainable


def _wrapper(*adapters: str, module: nn.Module | None = None) -> ModulesToSaveWrapper:
    """A wrapped linear layer whose i-th adapter's weight is i + 1 above the original."""
    wrapper = ModulesToSaveWrapper(nn.Linear(4, 2) if module is None else module, adapters[0])
    for name in adapters[1:]:
        wrapper.update(name)
    with torch.no_grad():
        for i, name in enumerate(adapters):
            for parameter in wrapper.modules_to_save[name].parameters():
                parameter.add_(i + 1)
    return wrapper


def _trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_first_adapter_is_active_and_trainable():
    original = nn.Linear(4, 2)
    wrapper = _wrapper("a", module=original)
    assert wrapper.original_module is original
    assert wrapper.active_adapters == ["a"]
    assert wrapper.active_adapter == "a"
    assert _trainable(wrapper) == {"modules_to_save.a.weight", "modules_to_save.a.bias"}
    x = torch.ones(3, 4)
    assert torch.equal(wrapper(x), wrapper.modules_to_save["a"](x))
    assert not torch.equal(wrapper(x), original(x))


def test_copies_are_independent():
    wrapper = _wrapper("a", "b")
    torch.testing.assert_close(wrapper.modules_to_save["b"].weight, wrapper.original_module.weight + 2)
    wrapper.update("a")
    torch.testing.assert_close(wrapper.modules_to_save["a"].weight, wrapper.original_module.weight + 1)


def test_switching():
    wrapper = _wrapper("a", "b")
    x = torch.ones(3, 4)
    wrapper.set_adapter("b")
    assert _trainable(wrapper) == {"modules_to_save.b.weight", "modules_to_save.b.bias"}
    assert torch.equal(wrapper(x), wrapper.modules_to_save["b"](x))
    wrapper.set_adapter(["a"], inference_mode=True)
    assert not _trainable(wrapper)
    wrapper.set_adapter([])
    assert torch.equal(wrapper(x), wrapper.original_module(x))
    with pytest.raises(ValueError, match="no adapter 'c'; it has 'a', 'b'"):
        wrapper.set_adapter("c")
    with pytest.raises(ValueError, match="one active adapter at a time"):
        wrapper.set_adapter(["a", "b"])


def test_requires_grad_without_switching():
    wrapper = _wrapper("a", "b")
    wrapper.set_requires_grad(["b", "unknown"])
    assert wrapper.active_adapters == ["a"]
    assert len(_trainable(wrapper)) == 4
    wrapper.set_requires_grad("a", False)
    assert _trainable(wrapper) == {"modules_to_save.b.weight", "modules_to_save.b.bias"}


def test_disabling():
    wrapper = _wrapper("a", "b")
    x = torch.ones(3, 4)
    wrapper.enable_adapters(False)
    assert wrapper.disable_adapters
    assert not _trainable(wrapper)
    assert torch.equal(wrapper(x), wrapper.original_module(x))
    assert wrapper.weight is wrapper.original_module.weight
    wrapper.enable_adapters(True)
    assert wrapper.weight is wrapper.modules_to_save["a"].weight
    assert _trainable(wrapper) == {"modules_to_save.a.weight", "modules_to_save.a.bias"}


def test_check_set_adapter():
    wrapper = _wrapper("a", "b")
    assert wrapper.check_set_adapter(["c", "b"]) == "b"
    assert wrapper.check_set_adapter(["c"]) is None
    with pytest.raises(ValueError, match="one active adapter at a time, got a, b"):
        wrapper.check_set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="is empty"):
        wrapper.check_set_adapter([])


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, hidden, factor=1.0):
        return self.layers(hidden) * self.scale * factor

    def greet(self):
        return "hello"


@pytest.mark.parametrize("module", [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), Head()])
def test_mixed_batch(module):
    wrapper = _wrapper("a", "b", module=module)
    x = torch.randn(5, 4)
    names = ["b", "a", "__base__", "elsewhere", "b"]
    y = wrapper(x, adapter_names=names)
    original = wrapper.original_module
    by_row = [wrapper.modules_to_save["b"], wrapper.modules_to_save["a"], original, original]
    by_row.append(wrapper.modules_to_save["b"])
    truth = torch.stack([part(x[i : i + 1])[0] for i, part in enumerate(by_row)])
    torch.testing.assert_close(y, truth)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in wrapper.modules_to_save["a"].parameters())


def test_mixed_batch_by_keyword_with_options():
    wrapper = _wrapper("a", "b", module=Head())
    x = torch.randn(2, 4)
    y = wrapper(hidden=x, factor=2.0, adapter_names=["a", "b"])
    torch.testing.assert_close(y[1:], wrapper.modules_to_save["b"](x[1:], factor=2.0))


def test_mixed_batch_refusals():
    wrapper = _wrapper("a", module=Head())
    with pytest.raises(ValueError, match="1 entries for a batch of 3"):
        wrapper(torch.ones(3, 4), adapter_names=["a"])
    with pytest.raises(TypeError, match="more than one tensor"):
        wrapper(torch.ones(1, 4), torch.ones(1, 2), adapter_names=["a"])
    with pytest.raises(TypeError, match="'hidden', is missing"):
        wrapper(factor=2.0, adapter_names=["a"])
    normed = _wrapper("a", module=nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match="batch normalisation"):
        normed(torch.ones(2, 4), adapter_names=["a", "a"])
    recurrent = _wrapper("a", module=nn.LSTM(4, 2, batch_first=True))
    with pytest.raises(TypeError, match="not a tensor"):
        recurrent(torch.ones(2, 3, 4), adapter_names=["a", "a"])


def test_attributes_of_the_version_in_use():
    wrapper = _wrapper("a", module=Head())
    assert wrapper.greet() == "hello"
    assert wrapper.scale is wrapper.modules_to_save["a"].scale
    assert not hasattr(wrapper, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018


def test_saved_keys():
    wrapper = _wrapper("a", "b", module=Head())
    state = wrapper.state_dict()
    saved = wrapper.adapter_state_dict("b", state)
    assert set(saved) == {f"layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")} | {"scale"}
    live = wrapper.adapter_state_dict_load_map("b")
    assert all(torch.equal(saved[key], state[live[key]]) for key in saved)
    assert wrapper.adapter_state_dict("c", state) == wrapper.adapter_state_dict_load_map("c") == {}
    with pytest.raises(KeyError):
        wrapper.adapter_state_dict("a", {})


def test_deleting():
    wrapper = _wrapper("a", "b")
    wrapper.delete_adapter("unknown", None)
    wrapper.delete_adapter("a", ["elsewhere", "b"])
    assert list(wrapper.modules_to_save) == ["b"]
    assert wrapper.active_adapters == ["b"]
    assert _trainable(wrapper) == {"modules_to_save.b.weight", "modules_to_save.b.bias"}
    wrapper.delete_adapter("b", None)
    assert wrapper.active_adapters == []
    x = torch.ones(1, 4)
    assert torch.equal(wrapper(x), wrapper.original_module(x))


def test_unloading():
    wrapper = _wrapper("a", "b")
    assert wrapper.unload_and_optionally_merge_module(False, False, None) is wrapper.original_module
    assert wrapper.unload_and_optionally_merge_module(True, False, None) is wrapper.modules_to_save["a"]
    assert wrapper.unload_and_optionally_merge_module(True, False, ["b", "c"]) is wrapper.modules_to_save["b"]
    assert wrapper.unload_and_optionally_merge_module(True, False, ["c"]) is wrapper.original_module
    with pytest.raises(ValueError, match="one active adapter at a time"):
        wrapper.unload_and_optionally_merge_module(True, False, ["a", "b"])
    with torch.no_grad():
        wrapper.modules_to_save["a"].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        wrapper.unload_and_optionally_merge_module(True, True, None)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_duplicates_are_whole(duplicate):
    wrapper = _wrapper("a", "b")
    other = duplicate(wrapper)
    x = torch.ones(1, 4)
    assert torch.equal(other(x), wrapper(x))
    assert other.weight is other.modules_to_save["a"].weight is not wrapper.weight
    assert type(other).__module__ == "peft.utils.other"


def test_tied_copies():
    embedding, head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
    head.weight = embedding.weight
    first = ModulesToSaveWrapper(embedding, "a")
    second = ModulesToSaveWrapper(head, "a", tied_module=first.modules_to_save["a"])
    assert second.modules_to_save["a"].weight is first.modules_to_save["a"].weight
    both = copy.deepcopy(nn.ModuleList([first, second]))
    assert both[0].modules_to_save["a"].weight is both[1].modules_to_save["a"].weight


def test_meta_modules_stay_meta():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    assert {parameter.device.type for parameter in _wrapper("a", module=module).parameters()} == {"meta"}


def test_integer_parameters_are_no_obstacle():
    module = Head()
    module.steps = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    wrapper = ModulesToSaveWrapper(module, "a")
    assert not wrapper.modules_to_save["a"].steps.requires_grad
    wrapper.set_adapter("a")


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_modules_are_refused(kind, nested):
    bnb = pytest.importorskip("bitsandbytes")
    layer = getattr(bnb.nn, kind)(64, 64, **({"has_fp16_weights": False} if kind == "Linear8bitLt" else {})).to("cpu")
    with pytest.raises(RuntimeError, match=rf"quantised {kind}.*llm_int8_skip_modules"):
        ModulesToSaveWrapper(nn.Sequential(layer) if nested else layer, "a")


def test_packed_buffers_are_refused():
    module = nn.Module()
    module.register_buffer("qweight", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="quantised"):
        ModulesToSaveWrapper(module, "a")


def test_containers_and_adapted_modules_are_refused():
    with pytest.raises(TypeError, match="ModuleList, which has no forward"):
        ModulesToSaveWrapper(nn.ModuleList([nn.Linear(2, 2)]), "a")
    with pytest.raises(TypeError, match=r"with an adapter already \(ModulesToSaveWrapper\)"):
        ModulesToSaveWrapper(_wrapper("a"), "a")
    model = get_peft_model(Toy(), LoraConfig(target_modules=["body"]))
    with pytest.raises(TypeError, match=r"with an adapter already \(Linear\)"):
        ModulesToSaveWrapper(model.base_model.model.body, "a")
    with pytest.raises(TypeError, match=r"with an adapter already \(Linear in body\)"):
        ModulesToSaveWrapper(model.base_model.model, "a")


def test_offloaded_modules_are_copied_with_their_values():
    module = nn.Linear(4, 2)
    weight = module.weight.detach().clone()
    weights_map = {name: value.detach().clone() for name, value in module.state_dict().items()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights_map, io_same_device=True)
    add_hook_to_module(module, hook)
    assert module.weight.device.type == "meta"
    wrapper = ModulesToSaveWrapper(module, "a")
    assert module.weight.device.type == "meta"
    trained = wrapper.modules_to_save["a"]
    assert torch.equal(trained.weight, weight)
    assert not trained._hf_hook.offload
    with torch.no_grad():
        trained.weight.add_(1)
    x = torch.ones(1, 4)
    torch.testing.assert_close(wrapper(x), x @ (weight + 1).T + trained.bias)
    wrapper(x).sum().backward()
    assert trained.weight.grad is not None


def test_dispatched_model():
    model = dispatch_model(Toy(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    model = get_peft_model(model, LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    trained = model.base_model.model.head.modules_to_save["default"]
    model(torch.tensor([[1, 2]])).sum().backward()
    assert trained.weight.grad is not None
    assert model.base_model.model.head.original_module.weight.grad is None


# ---- in a model ----------------------------------------------------------------------------------------------------
def test_set_trainable():
    model = Toy()
    assert _set_trainable(model, "a", module_names=None, inference_mode=False) is None
    assert _set_trainable(model, "a", module_names=["nothing"], inference_mode=False) == []
    with pytest.raises(ValueError, match="no module called 'nothing'"):
        _set_trainable(model, "a", module_names=["nothing"], inference_mode=False, strict_module_check=True)
    (wrapper,) = _set_trainable(model, "a", module_names=["head"], inference_mode=False)
    assert model.head is wrapper
    assert _trainable(wrapper) == {"modules_to_save.a.weight", "modules_to_save.a.bias"}
    _set_trainable(model, "b", module_names=["head"], inference_mode=False, activate_adapter=False)
    _set_trainable(model, "c", module_names=["head"], inference_mode=True)
    assert _trainable(wrapper) == {"modules_to_save.a.weight", "modules_to_save.a.bias"}
    assert sorted(wrapper.modules_to_save) == ["a", "b", "c"]


def test_only_the_outermost_match_is_wrapped():
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    wrappers = _set_trainable(model, "a", module_names=["head", "0"], inference_mode=False)
    assert wrappers == [model["head"]]
    assert not any(isinstance(part, AuxiliaryTrainingWrapper) for part in model["head"].modules_to_save["a"].modules())
    assert _set_trainable(model, "b", module_names=["head", "0"], inference_mode=False) == wrappers


def test_set_adapter_in_a_model():
    model = nn.ModuleDict({"x": _wrapper("a", "b"), "y": _wrapper("a")})
    _set_adapter(model, "b")
    assert model["x"].active_adapters == ["b"]
    assert model["y"].active_adapters == []
    with pytest.raises(ValueError, match="one active adapter"):
        _set_adapter(model, ["a", "b"])
    assert model["y"].active_adapters == []
    _set_adapter(model, ["a", "unknown"], inference_mode=True)
    assert model["x"].active_adapters == model["y"].active_adapters == ["a"]
    assert not _trainable(model)


def test_freeze_adapter():
    model = nn.ModuleDict({"x": _wrapper("a", "b")})
    model["x"].set_requires_grad("b")
    _freeze_adapter(model, "modules_to_save.a")
    assert _trainable(model) == {"x.modules_to_save.b.weight", "x.modules_to_save.b.bias"}


def test_late_adapter_leaves_the_active_one_on_the_original():
    model = get_peft_model(Toy(), LoraConfig(target_modules=["body"]))
    model.add_adapter("late", LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    head = model.base_model.model.head
    assert head.active_adapters == []
    assert not _trainable(head)
    model.set_adapter("late")
    assert _trainable(head) == {"modules_to_save.late.weight", "modules_to_save.late.bias"}


def test_inference_adapter_does_not_freeze_the_training_one():
    model = Toy()
    config = LoraConfig(target_modules=["body"], modules_to_save=["head"])
    set_additional_trainable_modules(model, config, {}, "a")
    frozen = LoraConfig(target_modules=["body"], modules_to_save=["head"], inference_mode=True)
    set_additional_trainable_modules(model, frozen, {}, "b")
    assert _trainable(model.head) == {"modules_to_save.a.weight", "modules_to_save.a.bias"}


def test_saving_and_loading_leaves_the_config_as_it_was(tmp_path):
    config = LoraConfig(target_modules=["body"], modules_to_save=["head"])
    model = get_peft_model(Toy(), config)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Toy(), tmp_path)
        assert again.peft_config["default"].modules_to_save == ["head"]
        torch.testing.assert_close(again.base_model.model.head.weight, model.base_model.model.head.weight)
        model = again


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_stay_tied_on_request(names):
    base = llama(tied=True)
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=names, ensure_weight_tying=True)
    model = get_peft_model(base, config)
    embedding, head = base.model.embed_tokens, base.lm_head
    assert isinstance(embedding, ModulesToSaveWrapper)
    assert embedding.modules_to_save["default"].weight is head.modules_to_save["default"].weight
    assert model.peft_config["default"].modules_to_save == names
    model.add_adapter("second", config)
    assert embedding.modules_to_save["second"].weight is head.modules_to_save["second"].weight
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        embedding.modules_to_save["default"].weight.mul_(2)
    adapted = model(ids).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(ids).logits, adapted)


def test_tied_embeddings_come_apart_with_a_warning():
    base = llama(tied=True)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"]))
    assert isinstance(base.lm_head, nn.Linear)
    with pytest.warns(UserWarning, match="no tied embeddings"):
        config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], ensure_weight_tying=True)
        get_peft_model(llama(), config)


def test_half_precision_modules_keep_their_dtype():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(
            llama(dtype=torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        )
    assert model.base_model.model.lm_head.weight.dtype == torch.bfloat16
