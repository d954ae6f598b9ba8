# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Files against upstream's release: which embeddings are in them, both formats, folders below folders; and adapters in
models without a wrapper, trained biases, and the helpers."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipes
import recipes_files  # noqa: F401  registers its recipes
from compare import DEEP, assert_equal, saved_facts
from peer import Peer

pytestmark = pytest.mark.interop
SETTINGS = {
    "plain": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ".*(q_proj|lm_head)"},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    recipes.run("published_base", folder=folder)
    return folder


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("save_embedding_layers", ["auto", True, False])
@pytest.mark.parametrize("vocabulary", [0, 40])
@pytest.mark.parametrize("name", SETTINGS)
def test_embeddings(
    name: str,
    vocabulary: int,
    save_embedding_layers: bool | str,
    adapters: int,
    published: str,
    peer: Peer,
    tmp_path: Path,
) -> None:
    made = {"published": published, "vocabulary": vocabulary, "adapters": adapters, "options": SETTINGS[name]}
    made["save_embedding_layers"] = save_embedding_layers
    ours = recipes.run("embeddings_written", folder=str(tmp_path / "ours"), **made)
    theirs = peer.run("embeddings_written", folder=str(tmp_path / "theirs"), **made)
    assert_equal(saved_facts(ours.pop("saved")), saved_facts(theirs.pop("saved")), "saved", ulps=DEEP)
    assert_equal(ours, theirs, ulps=DEEP)
    read = {"published": published, "vocabulary": vocabulary}
    for writer in ("ours", "theirs"):
        folder = str(tmp_path / writer)
        found = recipes.run("embeddings_read", folder=folder, **read)
        assert_equal(found, peer.run("embeddings_read", folder=folder, **read), writer, ulps=DEEP)
        if vocabulary == 0 or save_embedding_layers:  # otherwise the new rows of the reader's base are others
            assert_equal(found["y"], ours["y"], writer, ulps=DEEP)


@pytest.mark.parametrize("safe", [True, False])
def test_formats_and_folders(safe: bool, published: str, peer: Peer, tmp_path: Path) -> None:
    sides = {"ours": recipes.run, "theirs": peer.run}
    written = {
        writer: run("written_elsewhere", published=published, folder=str(tmp_path / writer), safe=safe)
        for writer, run in sides.items()
    }
    assert_equal(written["ours"], written["theirs"], ulps=DEEP)
    for writer in sides:
        for run in sides.values():
            for by in ("model", "second", "auto"):
                found = run("read_elsewhere", published=published, folder=str(tmp_path / writer), by=by)
                assert_equal(found["y"], written[writer]["y"], f"{writer} by {by}", ulps=DEEP)


_TARGETS = (["q_proj"], ["w2"], ["w1", "w2", "w3"], ["q_proj", "w2"], ["gate", "w2"])


@pytest.mark.parametrize(
    ("model", "targets", "options"),
    [
        ("llava", ["q_proj", "v_proj"], {}),
        *(("mixtral", targets, {}) for targets in _TARGETS),
        *(("mixtral", targets, {"use_rslora": True}) for targets in _TARGETS if "w1" not in targets),
    ],
    ids=str,
)
def test_layouts_of_transformers_4(
    model: str, targets: list[str], options: dict[str, bool], peer: Peer, tmp_path: Path
) -> None:
    made = {"model": model, "targets": targets, **options}
    ours = recipes.run("former_layout", folder=str(tmp_path / "ours"), **made)
    assert ours["right"]
    assert_equal(ours, peer.run("former_layout", folder=str(tmp_path / "theirs"), **made), ulps=DEEP)


@pytest.mark.parametrize(
    ("targets", "options"), [(["w1", "w3"], {}), (["w1", "w2", "w3"], {"use_rslora": True})], ids=str
)
def test_layouts_that_the_release_reads_wrong(
    targets: list[str], options: dict[str, bool], peer: Peer, tmp_path: Path
) -> None:
    """It loads nothing where the stacked halves alone are adapted, and scales them by another root of the rank."""
    made = {"model": "mixtral", "targets": targets, **options}
    assert recipes.run("former_layout", folder=str(tmp_path / "ours"), **made)["right"]
    assert not peer.run("former_layout", folder=str(tmp_path / "theirs"), **made)["right"]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_beside_an_attention(bias: str, peer: Peer) -> None:
    assert_equal(recipes.run("biases_written", bias=bias), peer.run("biases_written", bias=bias))


@pytest.mark.parametrize("dora", [False, True])
def test_functional(dora: bool, peer: Peer) -> None:
    assert_equal(recipes.run("without_wrapper", dora=dora), peer.run("without_wrapper", dora=dora))


def test_helpers(peer: Peer, tmp_path: Path) -> None:
    ours = recipes.run("helpers_asked", folder=str(tmp_path / "ours"))
    assert_equal(ours, peer.run("helpers_asked", folder=str(tmp_path / "theirs")))
