# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What `save_pretrained` writes, and that an interrupted save leaves the old adapter whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import adapted, llama, logits, lora
from torch import nn

import peft.peft_model.saving
from peft import LoraConfig, PeftConfig, PeftModel, PeftWarning, TrainableTokensConfig, get_peft_model
from peft.peft_model.saving import without_shared_storage
from peft.tuners.lora import LoraLayer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
HERE = Path(__file__).parent


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)


def test_files_and_config(tmp_path):
    model = adapted()
    folder = tmp_path / "a" / "b"
    assert model.save_pretrained(folder) is None
    assert sorted(os.listdir(folder)) == FILES
    saved = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["auto_mapping"] is None and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] is None
    assert model.peft_config["default"].inference_mode is False


def test_auto_mapping_names_the_base_models_class(tmp_path):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0 = nn.Linear(4, 4)

    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {"base_model_class": "MLP", "parent_library": MLP.__module__}
    assert model.peft_config["default"].auto_mapping is None


def test_other_names_go_to_folders_of_their_own(tmp_path):
    model = adapted()
    model.add_adapter("second", lora(r=3, use_dora=True))
    model.save_pretrained(tmp_path)
    assert sorted(content(tmp_path)) == [*FILES, "second/adapter_config.json", "second/adapter_model.safetensors"]
    assert PeftConfig.from_pretrained(tmp_path / "second").r == 3
    only = tmp_path / "only"
    model.save_pretrained(only, selected_adapters=["second"])
    assert sorted(content(only)) == ["README.md", "second/adapter_config.json", "second/adapter_model.safetensors"]


def test_bin_files_and_what_is_loaded_when_the_format_changes(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    change(model)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    change(model)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_only_the_main_process_writes(tmp_path):
    folder = tmp_path / "none"
    adapted().save_pretrained(folder, is_main_process=False)
    assert not folder.exists()


def test_a_state_dict_gathered_elsewhere_is_saved(tmp_path):
    model = adapted()
    gathered = {key: torch.full_like(value, 3.0) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all((value == 3.0).all() for value in saved.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selected_adapters": ["nope"]}, "nope"),
        ({"push_to_hub": True}, "push_to_hub"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        adapted().save_pretrained(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        adapted().save_pretrained(path)
    assert path.read_text() == "mine"


def test_shared_and_partial_memory_is_written_once_each(tmp_path):
    memory = torch.arange(1000.0)
    state = without_shared_storage({"a": memory[:10], "b": memory[:10], "c": memory.view(10, 100).t(), "d": memory})
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(storages) == 4
    assert torch.equal(state["c"], memory.view(10, 100).t()) and torch.equal(state["b"], memory[:10])
    torch.save({"a": state["a"]}, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size < 3000


@pytest.mark.parametrize("broken", ["weights", "config", "second adapter", "card"])
def test_a_save_that_raises_leaves_everything_as_it_was(tmp_path, monkeypatch, broken):
    model = adapted()
    model.add_adapter("second", lora())
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path))
    change(model)
    model.peft_config["default"].r = 77

    calls = []
    save_file = peft.peft_model.saving.save_file

    def failing(state, path, metadata):
        calls.append(path)
        save_file(state, path, metadata=metadata)
        with open(path, "r+b") as file:  # half a file
            file.truncate(20)
        if broken == "weights" or len(calls) == 2:
            raise OSError("disk full")

    if broken in ("weights", "second adapter"):
        monkeypatch.setattr(peft.peft_model.saving, "save_file", failing)
    elif broken == "config":
        model.peft_config["default"].alpha_pattern = {"q_proj": object()}
    else:
        monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: 1 / 0)
    with pytest.raises((OSError, TypeError, ZeroDivisionError)):
        model.save_pretrained(tmp_path)
    assert content(tmp_path) == before
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {here!r})
    import torch
    from tiny_models import adapted
    import peft.peft_model.saving as saving
    import peft.utils.atomic as atomic

    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(9.0)
    real = getattr({module}, {function!r})
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr({module}, {function!r}, killed)
    model.save_pretrained({folder!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("module", "function", "at", "is_new"),
    [
        ("atomic", "_sync", 3, False),  # past the card's two: the weights are written, but not known to be on the disk
        ("saving", "_config_bytes", 1, False),  # before the config is written
        ("os", "replace", 4, True),  # the weights are in place, the config of the same content is not
    ],
)
def test_a_save_that_is_killed_leaves_an_adapter_that_loads(tmp_path, module, function, at, is_new):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    script = textwrap.dedent(KILLED).format(
        here=str(HERE), module=module, function=function, at=at, folder=str(tmp_path)
    )
    result = subprocess.run([sys.executable, "-c", script], check=False, env=os.environ)
    assert result.returncode == -signal.SIGKILL
    after = content(tmp_path)
    if not is_new:
        assert {name: after[name] for name in before if name != "README.md"} == {
            name: data for name, data in before.items() if name != "README.md"
        }
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    value = loaded.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert bool((value == 9.0).all()) == is_new
    change(model)
    model.save_pretrained(tmp_path)  # what the killed process left is in nobody's way
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_new_files_have_ordinary_permissions(tmp_path):
    adapted().save_pretrained(tmp_path)
    plain = tmp_path / "plain"
    plain.write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in FILES}
    assert modes == {plain.stat().st_mode}


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    target = tmp_path / "blob"
    target.write_bytes(b"shared")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").symlink_to(target)
    adapted().save_pretrained(folder)
    assert target.read_bytes() == b"shared" and not (folder / "adapter_model.safetensors").is_symlink()


def test_model_card(tmp_path):
    base = llama()
    base.name_or_path = "org/base"
    model = get_peft_model(base, lora())
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in ("base_model: org/base", "library_name: peft", "pipeline_tag: text-generation"):
        assert f"\n{line}\n" in card
    for tag in ("base_model:adapter:org/base", "lora", "transformers"):
        assert f"\n- {tag}\n" in card
    assert f"- PEFT {peft.__version__}" in card
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def test_a_users_model_card_is_completed_and_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\nbase_model: mine/own\ntags:\n- foo\n---\n# My card\n\nbody\n")
    model = adapted()
    model.create_or_update_model_card(tmp_path)
    card = path.read_text()
    for part in ("license: mit", "base_model: mine/own", "- foo", "- lora", "# My card", "body", "library_name: peft"):
        assert part in card
    path.write_text(card.replace(f"PEFT {peft.__version__}", "PEFT 0.1"))
    model.create_or_update_model_card(tmp_path)
    assert path.read_text() == card


def test_an_unreadable_model_card_is_left_alone_and_the_adapter_saved(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\n- no\n- mapping\n---\nbody")
    with pytest.warns(PeftWarning, match="no model card"):
        adapted().save_pretrained(tmp_path)
    assert path.read_text() == "---\n- no\n- mapping\n---\nbody"
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_heads_are_not_saved_twice(tmp_path):
    from tiny_models import bert_config
    from transformers import BertForSequenceClassification

    model = get_peft_model(BertForSequenceClassification(bert_config()), LoraConfig(task_type="SEQ_CLS", r=2))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).modules_to_save == ["classifier", "score"]
        model = PeftModel.from_pretrained(BertForSequenceClassification(bert_config()), tmp_path)


def test_conversion_is_refused_where_it_would_be_wrong(tmp_path):
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2]))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert list(model.peft_config) == ["default"]


def test_an_adapter_whose_start_changed_the_base_weights_becomes_a_plain_one(tmp_path):
    """W' = W − s·B₀A₀ with the adapter BA is what W is with the converted adapter, of twice the rank."""
    patterns = {"rank_pattern": {"q_proj": 3}, "lora_alpha": 5}
    for number, options in enumerate([{}, {"use_dora": True}, {"use_rslora": True}, patterns]):
        initial, out = tmp_path / f"initial{number}", tmp_path / f"out{number}"
        model = adapted(modules_to_save=["lm_head"], **options).train()
        model.save_pretrained(initial)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.base_layer.weight -= layer.get_delta_weight("default")
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(out, path_initial_model_for_weight_conversion=str(initial))
        assert model.training and list(model.peft_config) == ["default"] and model.peft_config["default"].r == 2
        assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
        config = PeftConfig.from_pretrained(out)
        assert config.r == 4 and config.init_lora_weights is True
        assert torch.allclose(logits(PeftModel.from_pretrained(llama(), out)), logits(model.eval()), atol=1e-5)
