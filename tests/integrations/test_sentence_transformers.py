# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA in sentence-transformers: added, trained, saved apart from the base and loaded again."""

from __future__ import annotations

import pytest
import torch
from loop_models import VOCAB, arguments, dora, losses, tokenizer
from transformers import BertConfig, BertModel

st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
losses_of = pytest.importorskip("sentence_transformers.losses")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


@pytest.fixture
def base(tmp_path):
    """The folder of a tiny encoder with its pooling."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = st.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    model.save_pretrained(str(tmp_path / "base"))
    return tmp_path / "base"


def encode(model):
    return torch.as_tensor(model.encode(TEXTS, show_progress_bar=False))


@pytest.mark.works_with("sentence-transformers", "`add_adapter`, `SentenceTransformerTrainer`, saving and loading")
def test_an_adapter_is_trained_saved_and_loaded(base, tmp_path):
    model = st.SentenceTransformer(str(base), device="cpu")
    before = encode(model)
    model.add_adapter(dora(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"]))
    torch.testing.assert_close(encode(model), before, rtol=1e-4, atol=1e-5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 3
    data = datasets.Dataset.from_dict({"anchor": TEXTS * 4, "positive": [text[::-1][:2][::-1] for text in TEXTS * 4]})
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, st.SentenceTransformerTrainingArguments, max_steps=8, save_strategy="no"),
        train_dataset=data,
        loss=losses_of.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    assert len(losses(trainer)) == 8
    after = encode(model)
    assert not torch.allclose(after, before, atol=1e-3)
    model.disable_adapters()
    torch.testing.assert_close(encode(model), before, rtol=1e-4, atol=1e-5)
    model.enable_adapters()
    model.save_pretrained(str(tmp_path / "adapter"))
    assert list((tmp_path / "adapter").rglob("adapter_model.safetensors"))
    assert not list((tmp_path / "adapter").rglob("model.safetensors"))
    again = st.SentenceTransformer(str(base), device="cpu")
    folder = next((tmp_path / "adapter").rglob("adapter_config.json")).parent
    again.load_adapter(str(folder))
    torch.testing.assert_close(encode(again), after, rtol=1e-4, atol=1e-5)
