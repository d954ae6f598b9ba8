# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every adapter's config has: its file, its type, and the model that it belongs to."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub import hf_hub_download
from packaging.version import InvalidVersion, Version
from transformers.utils import PushToHubMixin

from peft.utils.atomic import write_atomically
from peft.utils.constants import CONFIG_NAME
from peft.utils.peft_types import PeftType, TaskType
from peft.utils.warning import PeftWarning

MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "use_auth_token")


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up at each use, as tests of other packages replace it
        import peft

        return peft.__version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _current_version() -> str:
    import sys

    return sys.modules[__name__].__version__


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """Reading and writing of configs.

    Args:
        task_type: What the model is for; see `TaskType`.
        peft_type: The method; see `PeftType`.
        auto_mapping: Class and library of a base model that is not reached by its task.
        peft_version: The version that wrote the config.
    """

    task_type: TaskType | None = field(default=None, metadata={"help": "What the model is for."})
    peft_type: PeftType | None = field(default=None, metadata={"help": "The method."})
    auto_mapping: dict | None = field(default=None, metadata={"help": "Class and library of the base model."})
    peft_version: str | None = field(default=None, metadata={"help": "The version that wrote the config."})

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(
                f"task_type={self.task_type!r} is unknown: use one of {', '.join(task.value for task in TaskType)}, "
                "or None."
            )
        if self.peft_version is None:
            self.peft_version = _current_version()

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns prompts and leaves the model's layers alone."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is LLaMA-Adapter's adaption prompt."""
        return False

    def to_dict(self) -> dict:
        """The config's fields; runtime settings are left out."""
        return asdict(self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, whole or not at all.

        Args:
            save_directory: Folder, made if it is not there.
            kwargs: `auto_mapping_dict` overrides `auto_mapping` in the file; the rest is passed on when
                `push_to_hub=True`.

        Raises:
            AssertionError: `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"save_directory={save_directory!r} is a file: name a folder.")
        os.makedirs(save_directory, exist_ok=True)
        content = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(os.path.join(save_directory, CONFIG_NAME), lambda path: path.write_text(text, "utf-8"))
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", str(save_directory).split(os.path.sep)[-1]), **kwargs)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfigMixin:
        """A config of the class that `peft_type` names (this one without it), from the values of a file.

        Unknown keys, such as those of newer releases, are left out with one warning.
        """
        from peft.tuners._registry import PEFT_TYPE_TO_CONFIG_MAPPING

        config_cls = cls
        if kwargs.get("peft_type") is not None:
            name = kwargs["peft_type"]
            if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
                raise KeyError(
                    f"peft_type={name!r} is not a method of this version; it has "
                    f"{', '.join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))}."
                )
            config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[name]
        return config_cls(**_known_arguments(config_cls, cls.check_kwargs(**kwargs)))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfigMixin:
        """Read a config from a folder or from the hub.

        Args:
            pretrained_model_name_or_path: Folder with an `adapter_config.json`, or a repository's id.
            subfolder: Folder inside it.
            kwargs: Arguments of `huggingface_hub.hf_hub_download`; others override values of the file that are not
                set there.

        Raises:
            ValueError: There is no such file, or it is no JSON.
            TypeError: The file names no `peft_type`, and neither does the class.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        hub_kwargs, class_kwargs, _ = cls._split_kwargs(kwargs)
        local = os.path.join(folder, CONFIG_NAME)
        if os.path.isfile(local):
            config_file = local
        else:
            config_file = _download_config(pretrained_model_name_or_path, subfolder, hub_kwargs)
        loaded = cls.from_json_file(config_file)
        return cls.from_peft_type(**{**class_kwargs, **loaded})

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict:
        """The content of a config file as a dict.

        Raises:
            ValueError: The file is no JSON object.
        """
        with open(path_json_file, encoding="utf-8") as file:
            try:
                content = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path_json_file} is not valid JSON ({error}): it may be truncated; save or download it again."
                ) from error
        if not isinstance(content, dict):
            raise ValueError(f"{path_json_file} holds a {type(content).__name__}, expected an object of settings.")
        if content.pop("runtime_config", None) is not None:
            warnings.warn(
                f"{path_json_file} holds a runtime_config, which is ignored: it belongs to a process, not to a file.",
                PeftWarning,
                stacklevel=3,
            )
        return content

    @classmethod
    def _split_kwargs(cls, kwargs: dict) -> tuple[dict, dict, dict]:
        """Arguments of the hub, of this class, and others."""
        hub_kwargs, class_kwargs, other_kwargs = {}, {}, {}
        own = inspect.signature(cls).parameters
        for key, value in kwargs.items():
            if key in _HUB_ARGUMENTS or key in inspect.signature(hf_hub_download).parameters:
                hub_kwargs[key] = value
            elif key in own:
                class_kwargs[key] = value
            else:
                other_kwargs[key] = value
        return hub_kwargs, class_kwargs, other_kwargs

    @classmethod
    def _get_peft_type(cls, model_id: str, **hf_hub_download_kwargs: Any) -> str:
        """The method that a saved adapter uses."""
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        local = os.path.join(model_id, subfolder or "", CONFIG_NAME)
        path = local if os.path.isfile(local) else _download_config(model_id, subfolder, hf_hub_download_kwargs)
        return cls.from_json_file(path)["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict:
        """Arguments for the constructor, after a look at them; a subclass may refuse or change some."""
        return kwargs


def _download_config(model_id: str, subfolder: str | None, hub_kwargs: dict) -> str:
    try:
        return hf_hub_download(model_id, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)
    except Exception as error:
        raise ValueError(
            f"Found no {CONFIG_NAME} in {os.path.join(model_id, subfolder) if subfolder else model_id!r}: it is no folder "
            f"that holds one, and the hub gave none ({type(error).__name__}). Check the path or the repository's id."
        ) from error


def _known_arguments(config_cls: type, kwargs: dict) -> dict:
    fields = {f.name for f in dataclasses.fields(config_cls)}
    is_a_method = config_cls.__post_init__ is not PeftConfigMixin.__post_init__
    if not is_a_method and set(kwargs) - fields and not MIN_EXPECTED_CONFIG_KEYS <= set(kwargs):
        raise TypeError(
            f"The config lacks {', '.join(sorted(MIN_EXPECTED_CONFIG_KEYS))}, so it does not say which method it is of: "
            "it is no adapter's config, or read it with the class of its method, such as LoraConfig."
        )
    return known_fields(config_cls, kwargs, allowed=MIN_EXPECTED_CONFIG_KEYS, written_by=kwargs.get("peft_version"))


def known_fields(
    settings_cls: type, values: dict, allowed: Collection[str] = (), written_by: str | None = None
) -> dict:
    """The values that a dataclass of settings takes; others are left out with one warning that names them.

    Args:
        settings_cls: The dataclass.
        values: Values by name.
        allowed: Names that are left out without a word.
        written_by: Version that wrote the values, for the hint to upgrade.
    """
    known = {f.name for f in dataclasses.fields(settings_cls) if f.init}
    unknown = sorted(set(values) - known - set(allowed))
    if unknown:
        warnings.warn(
            f"{settings_cls.__name__} does not know {', '.join(unknown)}, which the config holds; ignored."
            + _newer_hint(written_by),
            PeftWarning,
            stacklevel=4,
        )
    return {key: value for key, value in values.items() if key in known}


def _newer_hint(written_by: str | None) -> str:
    try:
        newer = written_by is not None and Version(written_by) > Version(_current_version())
    except InvalidVersion:
        newer = False
    return f" It was written by version {written_by}: upgrade this package to use all of it." if newer else ""


@dataclass
class PeftConfig(PeftConfigMixin):
    """The config of an adapter.

    Args:
        base_model_name_or_path: The base model that it was made for.
        revision: That model's revision on the hub.
        inference_mode: Whether the adapter is to be used as it is, not trained.
    """

    task_type: str | TaskType | None = field(default=None, metadata={"help": "What the model is for."})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "The method."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "The base model."})
    revision: str | None = field(default=None, metadata={"help": "The base model's revision."})
    inference_mode: bool = field(default=False, metadata={"help": "Whether the adapter is used, not trained."})


@dataclass
class PromptLearningConfig(PeftConfig):
    """The config of a method that learns prompts.

    Args:
        num_virtual_tokens: How many tokens are learnt.
        token_dim: Width of the base model's hidden state.
        num_transformer_submodules: 2 for an encoder with a decoder, else 1.
        num_attention_heads: Of the base model.
        num_layers: Of the base model.
        modules_to_save: Modules to train and save besides the prompt.
    """

    num_virtual_tokens: int = field(default=None, metadata={"help": "How many tokens are learnt."})
    token_dim: int = field(default=None, metadata={"help": "Width of the hidden state."})
    num_transformer_submodules: int | None = field(default=None, metadata={"help": "2 for encoder and decoder."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of the model."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of the model."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save."})

    @property
    def is_prompt_learning(self) -> bool:
        return True
