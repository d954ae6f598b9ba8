# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: written beside, then put in place."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


class StagedFiles:
    """A block in which files are written beside their places; at its end they are moved there, in the order written.

    If the block raises, nothing is moved and what was written is removed. Each file is on the disk before the first
    one is moved, and a move replaces a whole file at once.
    """

    def __init__(self) -> None:
        self._staged: list[tuple[Path, Path]] = []
        self._obsolete: dict[Path, Path] = {}

    def write(self, path: Path, writer: Callable[[Path], Any], obsolete: Path | None = None) -> None:
        """Stage one file.

        Args:
            path: Its place.
            writer: Called with a path to write to.
            obsolete: A file that the new one makes wrong, removed once the new one is in place.
        """
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._staged.append((staged, path))
        writer(staged)
        os.chmod(staged, 0o666 & ~_umask())  # some writers give no rights to others
        _sync(staged)
        if obsolete is not None:
            self._obsolete[path] = obsolete

    def __enter__(self) -> StagedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for staged, path in self._staged:
                    os.replace(staged, path)
                    if path in self._obsolete:
                        self._obsolete[path].unlink(missing_ok=True)
                for folder in {path.parent for _, path in self._staged}:
                    _sync(folder)
        finally:
            for staged, _ in self._staged:
                staged.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, writer: Callable[[Path], Any]) -> None:
    """Write one file; if that fails or the process dies in between, what stood there before is untouched.

    Args:
        path: File to create or replace.
        writer: Called with a path, in the same folder, to write to.
    """
    with StagedFiles() as files:
        files.write(Path(path), writer)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
