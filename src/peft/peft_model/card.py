# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The README.md beside a saved adapter: what it is, what it belongs to, and how to load it."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from peft.config import PeftConfig
from peft.utils.atomic import write_atomically
from peft.utils.peft_types import TaskType
from peft.utils.seams import public
from peft.utils.warning import PeftWarning

from .status import method_name

if TYPE_CHECKING:
    from .base import PeftModel

CARD_NAME = "README.md"
VERSIONS_HEADING = "### Framework versions"
_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}
_TEXT = """
# {method} adapter{belongs}

These are adapter weights for PEFT. They change {base}, which is needed as well.

```python
from peft import {auto_class}

model = {auto_class}.from_pretrained("this folder or repository")
```

Say here what the adapter was trained for, on which data, and how it was evaluated.
"""
_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoPeftModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoPeftModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoPeftModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoPeftModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoPeftModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoPeftModelForFeatureExtraction",
}


def write_model_card(model: PeftModel, directory: str | os.PathLike) -> None:
    """Write the card of a model's adapters, or complete the one that is there.

    A card's text and data stay as they are; what is missing for an adapter to be found on the Hub is added. A card that
    cannot be read is left alone, with a warning.

    Args:
        model: Model whose adapters lie in the folder.
        directory: The folder, made if it is not there.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CARD_NAME
    if path.exists():
        try:
            card = ModelCard.load(path)
        except ValueError as error:
            warnings.warn(f"{path} is left as it is, since it is no model card: {error}", PeftWarning, stacklevel=3)
            return
    else:
        card = ModelCard(f"---\n{ModelCardData(library_name='peft').to_yaml()}\n---\n{_text(model)}")
    _complete(card, model)
    content = str(card)
    write_atomically(path, lambda staged: staged.write_text(content, encoding="utf-8"))


def _config(model: PeftModel) -> PeftConfig:
    """The config of the first adapter."""
    return next(iter(model.peft_config.values()))


def _base_name(model: PeftModel) -> str | None:
    name = _config(model).base_model_name_or_path
    return name or getattr(model.get_base_model(), "name_or_path", None) or None


def _text(model: PeftModel) -> str:
    base = _base_name(model)
    return _TEXT.format(
        method=method_name(_config(model)),
        belongs=f" for {base}" if base else "",
        base=f"the base model `{base}`" if base else "a base model",
        auto_class=_AUTO_CLASSES.get(_config(model).task_type, "AutoPeftModel"),
    )


def _complete(card: ModelCard, model: PeftModel) -> None:
    base, config = _base_name(model), _config(model)
    data = card.data
    data.library_name = "peft"
    tags = [method_name(config).lower()]
    if base:
        data.base_model = data.base_model or base
        tags.append(f"base_model:adapter:{base}")
    if type(model.get_base_model()).__module__.startswith("transformers."):
        tags.append("transformers")
    data.tags = sorted({*(data.tags or ()), *tags})
    if data.pipeline_tag is None:
        data.pipeline_tag = _PIPELINES.get(config.task_type)
    version = f"{VERSIONS_HEADING}\n\n- PEFT {public('peft', '__version__')}"
    pattern = re.compile(re.escape(VERSIONS_HEADING) + r"\n+- PEFT \S+")
    if pattern.search(card.text):
        card.text = pattern.sub(version, card.text)
    elif VERSIONS_HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{version}\n"
