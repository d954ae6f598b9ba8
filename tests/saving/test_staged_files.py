# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Files appear whole or not at all."""

from __future__ import annotations

import pytest

from peft.utils.atomic import StagedFiles, write_atomically


def test_files_are_moved_in_order_and_remove_what_they_replace(tmp_path):
    (tmp_path / "old").write_text("old")
    with StagedFiles() as files:
        files.write(tmp_path / "a", lambda path: path.write_text("a"), obsolete=tmp_path / "old")
        files.write(tmp_path / "b", lambda path: path.write_text("b"))
        assert not (tmp_path / "a").exists() and (tmp_path / "old").exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "a", "b": "b"}


def test_a_block_that_fails_leaves_everything(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), StagedFiles() as files:
        files.write(tmp_path / "a", lambda path: path.write_text("new"))
        files.write(tmp_path / "b", lambda path: 1 / 0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_one_file_has_ordinary_permissions_even_if_its_writer_gives_none(tmp_path):
    def writer(path):
        path.write_text("new")
        path.chmod(0o600)

    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "a", writer)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
