# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: written beside, then put in place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any


def write_atomically(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, make sure it is on disk, and rename it to `path`.

    If anything fails or the process dies in between, what stood at `path` before is untouched.

    Args:
        path: File to create or replace.
        write: Called with the temporary file's name.
    """
    folder, name = os.path.split(os.fspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder or ".")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
