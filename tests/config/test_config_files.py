# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Configs on their way to a file and back, and the files that are refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

import peft
import peft.config
from peft import LoraConfig, PeftConfig, PeftWarning, TaskType, TrainableTokensConfig
from peft.config import PeftConfigMixin, PromptLearningConfig
from peft.tuners.lora.config import EvaConfig, LoraRuntimeConfig

FILE = "adapter_config.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    LoraConfig(r=5, target_modules=["b", "a"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, without: tuple[str, ...] = (), **values: Any) -> None:
    """Change fields of a saved config."""
    content = json.loads((folder / FILE).read_text()) | values
    (folder / FILE).write_text(json.dumps({key: value for key, value in content.items() if key not in without}))


# ---- there and back ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        LoraConfig(
            r=3, target_modules=["q", "v"], exclude_modules="x.*", rank_pattern={"q": 2}, modules_to_save=["h"]
        ),
        LoraConfig(use_dora=True, use_dora_triton=True, layers_to_transform=[1, 2], layers_pattern="h"),
        LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.5)),
        LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 2, "loftq_iter": 3}),
        LoraConfig(task_type=TaskType.SEQ_CLS, base_model_name_or_path="some/model", revision="abc"),
        TrainableTokensConfig(token_indices=[3, 1]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_config_comes_back_equal(tmp_path, config):
    config.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    for cls in (PeftConfig, type(config)):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is type(config) and loaded == config


def test_sets_are_written_in_order(saved):
    content = json.loads((saved / FILE).read_text())
    assert content["target_modules"] == ["a", "b"]
    assert list(content) == sorted(content)


def test_runtime_settings_stay_in_the_process(tmp_path):
    LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True)).save_pretrained(tmp_path)
    assert "runtime_config" not in json.loads((tmp_path / FILE).read_text())
    rewrite(tmp_path, runtime_config={"ephemeral_gpu_offload": True})
    with pytest.warns(PeftWarning, match="runtime_config"):
        assert LoraConfig.from_pretrained(tmp_path).runtime_config == LoraRuntimeConfig()


def test_use_dora_triton_is_written_only_when_it_is_on(tmp_path):
    assert "use_dora_triton" not in LoraConfig(use_dora=True).to_dict()
    config = LoraConfig(use_dora=True, use_dora_triton=True)
    assert config.to_dict()["use_dora_triton"] is True
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).use_dora_triton


def test_auto_mapping_can_be_given_for_the_file_alone(tmp_path):
    config = LoraConfig()
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "M"})
    assert config.auto_mapping is None
    assert LoraConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "M"}


def test_a_subfolder_and_arguments_of_the_hub(tmp_path):
    LoraConfig(r=7).save_pretrained(tmp_path / "inner")
    config = LoraConfig.from_pretrained(tmp_path, subfolder="inner", revision="main", token=None, cache_dir="nowhere")
    assert config.r == 7


def test_the_file_wins_over_arguments(saved):
    assert LoraConfig.from_pretrained(saved, r=9, inference_mode=True).r == 5
    rewrite(saved, without=("r",))
    assert LoraConfig.from_pretrained(saved, r=9).r == 9


def test_hub_arguments_reach_the_hub(monkeypatch, saved):
    seen = {}

    def download(repo_id, filename, **kwargs):
        seen.update(kwargs, repo_id=repo_id, filename=filename)
        return os.path.join(saved, FILE)

    monkeypatch.setattr(peft.config, "hf_hub_download", download)
    assert (
        PeftConfig.from_pretrained("some/adapter", subfolder="s", revision="r", token="t", local_files_only=True).r
        == 5
    )
    assert seen == {
        "repo_id": "some/adapter",
        "filename": FILE,
        "subfolder": "s",
        "revision": "r",
        "token": "t",
        "local_files_only": True,
    }


# ---- a save that fails ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(monkeypatch, saved, step):
    before = (saved / FILE).read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        LoraConfig(r=6).save_pretrained(saved)
    assert (saved / FILE).read_bytes() == before
    assert os.listdir(saved) == [FILE]


def test_what_json_cannot_hold_is_refused_before_the_file_is_touched(saved):
    before = (saved / FILE).read_bytes()
    with pytest.raises(TypeError):
        LoraConfig(megatron_config={"a": object()}).save_pretrained(saved)
    assert (saved / FILE).read_bytes() == before


def test_a_file_is_no_folder(saved):
    with pytest.raises(AssertionError, match="is a file"):
        LoraConfig().save_pretrained(saved / FILE)


# ---- files of other versions ---------------------------------------------------------------------------------------
def test_unknown_keys_are_named_in_one_warning(saved):
    rewrite(saved, new_option=1, another=2)
    with pytest.warns(PeftWarning, match="another, new_option") as caught:
        config = PeftConfig.from_pretrained(saved)
    assert len(caught) == 1 and "upgrade" not in str(caught[0].message)
    assert config.r == 5 and not hasattr(config, "new_option")


def test_unknown_keys_of_a_newer_version_hint_at_upgrading(saved):
    rewrite(saved, new_option=1, peft_version="99.0")
    with pytest.warns(PeftWarning, match=r"new_option.*99\.0.*upgrade"):
        LoraConfig.from_pretrained(saved)


def test_a_newer_version_alone_is_no_reason_to_warn(saved):
    rewrite(saved, peft_version="99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig.from_pretrained(saved).peft_version == "99.0"


def test_unknown_keys_inside_an_option_are_named_too(saved):
    rewrite(saved, init_lora_weights="eva", eva_config={"rho": 2.5, "newer": 1})
    with pytest.warns(PeftWarning, match="EvaConfig does not know newer"):
        assert LoraConfig.from_pretrained(saved).eva_config == EvaConfig(rho=2.5)


def test_the_version_is_looked_up_when_a_config_is_built(monkeypatch):
    assert LoraConfig().peft_version == peft.__version__
    monkeypatch.setattr(peft.config, "__version__", "1.2.3", raising=False)
    assert LoraConfig().peft_version == "1.2.3"
    assert LoraConfig(peft_version="0.5").peft_version == "0.5"


def test_a_file_with_few_keys_is_completed_by_defaults(tmp_path):
    (tmp_path / FILE).write_text('{"peft_type": "LORA", "r": 3}')
    assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(r=3)


def test_the_class_can_stand_for_a_missing_type(saved):
    rewrite(saved, without=("peft_type",))
    assert LoraConfig.from_pretrained(saved).r == 5
    with pytest.raises(TypeError, match="peft_type"):
        PeftConfig.from_pretrained(saved)


# ---- broken files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [0, 40])
def test_a_truncated_file_is_named(saved, length):
    path = saved / FILE
    path.write_text(path.read_text()[:length])
    with pytest.raises(ValueError, match=f"{FILE} is not valid JSON"):
        LoraConfig.from_pretrained(saved)


def test_json_that_is_no_object_is_refused(saved):
    (saved / FILE).write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        LoraConfig.from_pretrained(saved)


@pytest.mark.parametrize("inner", [None, "inner"])
def test_a_missing_file_is_named_with_its_folder(tmp_path, inner):
    with pytest.raises(ValueError, match=FILE) as caught:
        LoraConfig.from_pretrained(tmp_path, subfolder=inner)
    assert repr(str(tmp_path / (inner or ""))) in str(caught.value)


def test_an_unknown_method_is_named(saved):
    rewrite(saved, peft_type="NO_SUCH_METHOD")
    with pytest.raises(KeyError, match="NO_SUCH_METHOD"):
        PeftConfig.from_pretrained(saved)


# ---- the base classes ----------------------------------------------------------------------------------------------
def test_from_peft_type():
    config = PeftConfig.from_peft_type(peft_type="LORA", r=3)
    assert type(config) is LoraConfig and config.r == 3
    assert type(PeftConfig.from_peft_type(task_type="CAUSAL_LM")) is PeftConfig


def test_an_unknown_task_lists_those_that_there_are():
    with pytest.raises(ValueError, match="task_type='NONSENSE'.*CAUSAL_LM"):
        LoraConfig(task_type="NONSENSE")


def test_kinds_of_methods():
    assert PromptLearningConfig().is_prompt_learning
    assert not LoraConfig().is_prompt_learning and not LoraConfig().is_adaption_prompt
    assert PeftConfigMixin.check_kwargs(r=1) == {"r": 1}


def test_the_method_of_a_saved_adapter(saved):
    assert PeftConfig._get_peft_type(str(saved)) == "LORA"
