# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Base model and adapter in one call: `AutoPeftModelFor….from_pretrained`."""

from __future__ import annotations

import importlib
import os
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from peft.config import PeftConfig
from peft.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.peft_model.loading import hub_arguments
from peft.utils.constants import TOKENIZER_CONFIG_NAME
from peft.utils.other import check_file_exists_on_hf_hub

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def get_default_import_allowlist() -> list[str]:
    """Packages whose modules a saved adapter may have imported to find its base model's class."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: list[str], parent_name: str) -> bool:
    """Whether a module belongs to one of the packages named.

    Args:
        allowlist: Names of packages.
        parent_name: Dotted name of a module.

    Example:
        >>> from peft.auto import check_import_allowlist
        >>> check_import_allowlist(["transformers"], "transformers.models.llama")
        True
    """
    return parent_name.partition(".")[0] in allowlist


class _BaseAutoPeftModel:
    """Loads a base model and an adapter on it; subclasses say for which task."""

    _target_class: type | None = None
    _target_peft_class: type[PeftModel] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not instantiated itself: call {name}.from_pretrained(adapter_name_or_path).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter's config names, and the adapter.

        If a tokenizer was saved with the adapter, the embeddings are resized to its vocabulary.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository of the adapter.
            adapter_name: Name to give the adapter.
            is_trainable: Load the adapter for further training.
            config: Config to use instead of the saved one.
            revision: Revision of the adapter's repository; the base model's is in the config.
            import_allowlist: Packages that may be imported to find the base model's class, for adapters without a task
                type; None for `get_default_import_allowlist()`.
            **kwargs: For the base model's `from_pretrained` and for `PeftModel.from_pretrained`.

        Raises:
            ValueError: The config names no base model or another task than this class, or wants to import a package
                that is not allowed.
        """
        path = os.fspath(pretrained_model_name_or_path)
        saved = PeftConfig.from_pretrained(path, revision=revision, **hub_arguments(kwargs))
        if saved.base_model_name_or_path is None:
            raise ValueError(
                f"The adapter config at {path!r} names no base model (base_model_name_or_path is null): load the base "
                "model yourself and use PeftModel.from_pretrained(base_model, path)."
            )
        target_class = cls._base_model_class(saved, import_allowlist)
        for_base = {key: value for key, value in kwargs.items() if key != "subfolder"}
        base_model = target_class.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **for_base)
        cls._fit_vocabulary(base_model, path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base_model, path, adapter_name=adapter_name, is_trainable=is_trainable, config=config, revision=revision,
            **kwargs,
        )  # fmt: skip

    @classmethod
    def _base_model_class(cls, config: PeftConfig, import_allowlist: list[str] | None) -> type:
        """The class to load the base model with."""
        task = config.task_type
        if cls._target_class is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task)
            if expected is not None and expected is not cls._target_peft_class:
                raise ValueError(
                    f"The adapter's task_type is {task!r}, which {expected.__name__} is for, but {cls.__name__} loads "
                    f"{cls._target_peft_class.__name__}: use Auto{expected.__name__}."
                )
            return cls._target_class
        if task is not None:
            name = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
            raise ValueError(f"The adapter's task_type is {task!r}: use Auto{name} instead of {cls.__name__}.")
        if config.auto_mapping is None:
            raise ValueError(
                "The adapter config has neither a task_type nor an auto_mapping, so the class of its base model is not "
                "known: load the base model yourself and use PeftModel.from_pretrained(base_model, path)."
            )
        library = config.auto_mapping["parent_library"]
        allowlist = get_default_import_allowlist() if import_allowlist is None else import_allowlist
        if not check_import_allowlist(allowlist, library):
            raise ValueError(
                f"The adapter config wants {library!r} to be imported, which is not in the allowed packages "
                f"{allowlist}. If you trust it, pass import_allowlist=[{library.partition('.')[0]!r}]."
            )
        return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"])

    @classmethod
    def _fit_vocabulary(cls, base_model: Any, path: str, revision: str | None, kwargs: dict[str, Any]) -> None:
        """Resize the embeddings to the tokenizer that was saved with the adapter, if any."""
        hub = {**hub_arguments(kwargs), "revision": revision}
        subfolder = hub.pop("subfolder", None) or ""
        if os.path.isdir(path):
            exists = os.path.exists(os.path.join(path, subfolder, TOKENIZER_CONFIG_NAME))
        else:
            repo_type = hub.pop("repo_type", None)
            token = hub.get("token")
            exists = check_file_exists_on_hf_hub(
                repo_id=path,
                filename="/".join(filter(None, (subfolder, TOKENIZER_CONFIG_NAME))),
                revision=revision,
                repo_type=repo_type,
                token=token,
            )
        if exists:
            tokenizer = AutoTokenizer.from_pretrained(
                path, subfolder=subfolder, trust_remote_code=kwargs.get("trust_remote_code", False), **hub
            )  # fmt: skip
            base_model.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """Loads adapters without a task type."""

    _target_class = None
    _target_peft_class = PeftModel


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """Loads adapters of models that find answers in a text."""

    _target_class = AutoModelForQuestionAnswering
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """Loads adapters of models that embed their input."""

    _target_class = AutoModel
    _target_peft_class = PeftModelForFeatureExtraction


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """Loads adapters of token classifiers."""

    _target_class = AutoModelForTokenClassification
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """Loads adapters of sequence classifiers."""

    _target_class = AutoModelForSequenceClassification
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """Loads adapters of sequence-to-sequence language models."""

    _target_class = AutoModelForSeq2SeqLM
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """Loads adapters of causal language models."""

    _target_class = AutoModelForCausalLM
    _target_peft_class = PeftModelForCausalLM
