# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Reading an adapter's file: formats, and files that are broken or of another model."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model, load_peft_weights

FILE = "adapter_model.safetensors"
KEY = "base_model.model.0.lora_A.weight"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def adapted(**settings) -> PeftModel:
    settings = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **settings}
    return get_peft_model(net(), LoraConfig(**settings)).eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    adapted().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def readers(folder: Path):
    """Both ways to load, each with a model that must stay as it is if loading fails."""
    base = net()
    yield base, lambda: PeftModel.from_pretrained(base, folder)
    model = adapted()
    yield model, lambda: model.load_adapter(folder, "other")


@pytest.mark.parametrize("safe", [True, False])
def test_both_formats(tmp_path, safe):
    model = adapted(use_dora=True)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    x = torch.randn(3, 6)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))
    assert (tmp_path / FILE).exists() == safe


def test_key_mapping_and_subfolder(tmp_path):
    adapted().save_pretrained(tmp_path / "inner")
    tensors = load_peft_weights(tmp_path, device="cpu", subfolder="inner", key_mapping={r"^0\.": "first."})
    assert "base_model.model.first.lora_A.weight" in tensors
    assert "base_model.model.2.lora_A.weight" in tensors


@pytest.mark.parametrize("size", [0, 5, 300])
def test_a_truncated_file_is_named_and_changes_nothing(saved, size):
    with open(saved / FILE, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=FILE):
        load_peft_weights(saved, device="cpu")
    for model, load in readers(saved):
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=FILE):
            load()
        assert list(model.state_dict()) == before


def test_a_missing_file_is_named(saved):
    (saved / FILE).unlink()
    with pytest.raises(ValueError, match=FILE):
        load_peft_weights(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({KEY: torch.zeros(3, 6)}), r"0\.lora_A.*\[3, 6\]"),
        (lambda tensors: tensors.update({KEY: torch.zeros(2, 6, dtype=torch.int64)}), r"0\.lora_A.*int64"),
    ],
    ids=["shape", "dtype"],
)
def test_a_wrong_tensor_is_named_with_its_folder(saved, change, message):
    rewrite(saved, change)
    for model, load in readers(saved):
        before = list(model.state_dict())
        with pytest.raises(RuntimeError, match=message) as caught:
            load()
        assert str(saved) in str(caught.value)
        assert list(model.state_dict()) == before


def test_ignore_mismatched_sizes(saved):
    rewrite(saved, lambda tensors: tensors.update({KEY: torch.zeros(3, 6)}))
    with pytest.warns(PeftWarning, match=r"0\.lora_A"):
        PeftModel.from_pretrained(net(), saved, ignore_mismatched_sizes=True)


def test_missing_and_unknown_tensors_are_warned_about(saved):
    rewrite(saved, lambda tensors: (tensors.pop(KEY), tensors.update({f"x.{KEY}": torch.zeros(2, 6)})))
    with pytest.warns(PeftWarning) as caught:
        PeftModel.from_pretrained(net(), saved)
    text = "\n".join(str(warning.message) for warning in caught)
    assert "base_model.model.0.lora_A.default.weight" in text and "x.base_model.model.0.lora_A" in text
    assert str(saved) in text


class Code:
    """Something that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["UNPICKLED"],)


def test_a_pickle_with_code_is_refused_unread(saved, monkeypatch):
    monkeypatch.setenv("UNPICKLED", str(saved / "ran"))
    (saved / FILE).unlink()
    for content in (pickle.dumps(Code()), None):
        if content is None:
            torch.save({"x": Code()}, saved / "adapter_model.bin")
        else:
            (saved / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.bin"):
            load_peft_weights(saved, device="cpu")
        assert not (saved / "ran").exists()


def test_a_bin_file_of_something_else_is_refused(saved):
    (saved / FILE).unlink()
    torch.save([1, 2], saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        load_peft_weights(saved, device="cpu")
