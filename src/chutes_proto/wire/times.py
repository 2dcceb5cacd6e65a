"""Times as answers tell them."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(at: int) -> str:
    """Unix seconds as RFC 3339 has them, in UTC with whole seconds and ``+00:00``, which deployed clients know."""
    return datetime.fromtimestamp(at, UTC).isoformat()
