# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One peer process for all interop tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from peer import Peer, PeerUnavailable, peer_python


@pytest.fixture(scope="session")
def peer() -> Iterator[Peer]:
    """Upstream's release in a process of its own; without one the tests skip, or fail under PEFT_REQUIRE_INTEROP=1."""
    try:
        running = Peer(peer_python())
    except PeerUnavailable as error:
        if os.environ.get("PEFT_REQUIRE_INTEROP") == "1":
            pytest.fail(f"PEFT_REQUIRE_INTEROP=1, but there is no peer: {error}", pytrace=False)
        pytest.skip(f"no peer: {error}")
    yield running
    running.close()
