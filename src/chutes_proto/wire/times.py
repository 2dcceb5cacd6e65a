"""Times in answers."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(at: int) -> str:
    """Format unix seconds by RFC 3339, in UTC with whole seconds and ``+00:00``, which deployed clients know."""
    return datetime.fromtimestamp(at, UTC).isoformat()
