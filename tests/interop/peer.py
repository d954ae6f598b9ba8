# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Upstream's installed release as a peer: its environment, and the process that runs recipes in it.

The environment holds upstream's wheel and nothing else; everything that both need comes from the environment of the
tests, over a path file. Nothing of upstream is read, it is only run.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from cases import UPSTREAM

HERE = Path(__file__).resolve().parent


class PeerUnavailable(RuntimeError):
    """No environment with upstream's release could be found or built."""


class PeerError(RuntimeError):
    """A recipe raised in the peer.

    Args:
        kind: Name of the exception's class.
        text: Its message.
        trace: Its traceback.
    """

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(f"{kind}: {text}\n--- in the peer ---\n{trace}")
        self.kind, self.text = kind, text


# ---- the environment -------------------------------------------------------------------------------------------------
def peer_python() -> Path:
    """The interpreter of an environment in which `import peft` is upstream's release; it is built where it is missing.

    `PEFT_PEER_PYTHON` names one that exists already.

    Raises:
        PeerUnavailable: There is none, and none can be built.
    """
    given = os.environ.get("PEFT_PEER_PYTHON")
    if given:
        if not Path(given).exists():
            raise PeerUnavailable(f"PEFT_PEER_PYTHON={given!r} does not exist.")
        return Path(given)
    folder = _environment_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        ready = folder / "ready"
        if not ready.exists():
            _build_environment(folder, python)
            ready.touch()
    return python


def _shared_paths() -> list[str]:
    """The folders that this environment's packages are in."""
    names = ("site-packages", "dist-packages")
    return [path for path in dict.fromkeys(sys.path) if Path(path).name in names and Path(path).is_dir()]


def _environment_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    shared = "\n".join([sys.executable, *_shared_paths()])
    digest = hashlib.sha256(shared.encode()).hexdigest()[:12]
    return cache / "peft-triton-tests" / f"peer-{UPSTREAM}-{digest}"


def _build_environment(folder: Path, python: Path) -> None:
    try:
        _command(sys.executable, "-m", "venv", "--clear", str(folder))
        _command(
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
            f"peft=={UPSTREAM}",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise PeerUnavailable(
            f"An environment with peft=={UPSTREAM} could not be built in {folder}: {detail.strip()[-600:]} "
            "Give pip an index, or name a Python that has it in PEFT_PEER_PYTHON."
        ) from error
    site_packages = _command(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Folders that a path file names come last on the path, and path files in them are not read: neither a copy nor an
    # editable install of ours that lives there can come before upstream's.
    Path(site_packages, "shared.pth").write_text("\n".join(_shared_paths()) + "\n", encoding="utf-8")


def _command(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=_clean_environ())
    return result.stdout


def _clean_environ() -> dict[str, str]:
    """The environment variables of a process that must not find our package or be told to interpret kernels."""
    drop = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TRITON_INTERPRET", "__PYVENV_LAUNCHER__"}
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# ---- the process -----------------------------------------------------------------------------------------------------
def send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next value from the other side.

    Raises:
        EOFError: The other side is gone.
    """
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the stream ended")
    (size,) = struct.unpack("<q", head)
    return pickle.loads(stream.read(size))


class Peer:
    """A process of upstream's environment that runs recipes, one after the other.

    Args:
        python: The environment's interpreter.

    Raises:
        PeerUnavailable: The process does not start, or `import peft` there is not upstream's release.
    """

    def __init__(self, python: Path) -> None:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [str(python), str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_clean_environ(),
            cwd=tempfile.gettempdir(),
        )
        try:
            hello = receive(self._process.stdout)
        except EOFError:
            raise PeerUnavailable(f"{python} does not run the peer: {self._tail()}") from None
        self.version, self.location = hello["version"], hello["location"]
        ours = HERE.parents[1] / "src"
        if self.version != UPSTREAM or Path(self.location).is_relative_to(ours):
            self.close()
            raise PeerUnavailable(
                f"import peft in {python} is {self.version} from {self.location}, and must be upstream's {UPSTREAM}."
            )

    def run(self, recipe: str, /, **arguments: Any) -> Any:
        """What a recipe of `recipes.py` returns in upstream's environment.

        Raises:
            PeerError: The recipe raised.
        """
        try:
            send(self._process.stdin, (recipe, arguments))
            answer = receive(self._process.stdout)
        except (EOFError, OSError):
            raise RuntimeError(f"The peer died in {recipe}({arguments}): {self._tail()}") from None
        if "raised" in answer:
            raise PeerError(*answer["raised"])
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _tail(self) -> str:
        self._process.poll()
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-1500:]


if __name__ == "__main__":
    # `python tests/interop/peer.py` builds the environment ahead of the tests.
    print(peer_python(), sysconfig.get_platform())
