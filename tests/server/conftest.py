"""Fixtures of most tests of the key server."""

from __future__ import annotations

import pytest

from tests.server.world import World


@pytest.fixture
def world() -> World:
    return World()
