# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Configs in files: round trips, files of other releases, and broken ones."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

import peft
from peft import LoraConfig, PeftConfig, PeftType, PeftWarning, TaskType, TrainableTokensConfig
from peft.tuners.lora.config import EvaConfig

NAME = "adapter_config.json"


def written(folder: Path, **changes) -> Path:
    """A folder with a LoRA config, some of its values replaced."""
    LoraConfig(r=4, target_modules=["q"]).save_pretrained(folder)
    content = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q", "v"], exclude_modules=["w"], rank_pattern={"q": 2}),
        LoraConfig(use_dora=True, use_dora_triton=True, use_rslora=True, bias="lora_only", task_type="CAUSAL_LM"),
        LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=3.0)),
        TrainableTokensConfig(token_indices=[1, 5]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_round_trip(tmp_path, config):
    config.save_pretrained(tmp_path)
    for reader in (PeftConfig, type(config)):
        loaded = reader.from_pretrained(tmp_path)
        assert type(loaded) is type(config)
        assert loaded.to_dict() == config.to_dict()


def test_sets_are_written_sorted_and_keys_too(tmp_path):
    LoraConfig(target_modules=["v", "q", "k"]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    assert content["target_modules"] == ["k", "q", "v"]
    assert list(content) == sorted(content)
    assert content["peft_version"] == peft.__version__


def test_the_triton_switch_is_written_only_when_on(tmp_path):
    LoraConfig(use_dora=True).save_pretrained(tmp_path)
    assert "use_dora_triton" not in json.loads((tmp_path / NAME).read_text())
    LoraConfig(use_dora=True, use_dora_triton=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["use_dora_triton"] is True


def test_unknown_keys_are_named_in_one_warning(tmp_path):
    written(tmp_path, from_the_future=1, another=2)
    with pytest.warns(PeftWarning, match="another, from_the_future") as caught:
        config = PeftConfig.from_pretrained(tmp_path)
    assert len(caught) == 1 and "upgrade" not in str(caught[0].message)
    assert config.r == 4


def test_a_newer_release_is_named(tmp_path):
    written(tmp_path, from_the_future=1, peft_version="99.0.0")
    with pytest.warns(PeftWarning, match="99.0.0"):
        PeftConfig.from_pretrained(tmp_path)


def test_no_warning_without_a_reason(tmp_path):
    written(tmp_path, peft_version="99.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "r": 4', "", "[1, 2]"])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=NAME):
        PeftConfig.from_pretrained(tmp_path)


def test_an_unknown_method_is_named(tmp_path):
    written(tmp_path, peft_type="NOT_A_METHOD")
    with pytest.raises(KeyError, match="NOT_A_METHOD"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name):
        PeftConfig.from_pretrained(tmp_path)


def test_subfolders_and_values_that_the_file_lacks(tmp_path):
    written(tmp_path / "inner")
    config = PeftConfig.from_pretrained(tmp_path, subfolder="inner")
    assert config.r == 4 and config.peft_type == PeftType.LORA
    content = json.loads((tmp_path / "inner" / NAME).read_text())
    del content["task_type"]
    (tmp_path / "inner" / NAME).write_text(json.dumps(content))
    assert PeftConfig.from_pretrained(tmp_path, subfolder="inner", task_type="CAUSAL_LM").task_type == TaskType.CAUSAL_LM


def test_a_config_of_a_file_overrides_arguments(tmp_path):
    assert LoraConfig.from_pretrained(written(tmp_path), r=16).r == 4


def test_saving_to_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(AssertionError, match="file"):
        LoraConfig().save_pretrained(file)


@pytest.mark.parametrize("cause", ["content", "disk"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, cause):
    written(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    config = LoraConfig(r=8)
    if cause == "content":
        config.rank_pattern = {"q": object()}
    else:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((TypeError, OSError)):
        config.save_pretrained(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
