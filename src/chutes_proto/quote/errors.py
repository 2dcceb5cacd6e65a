"""The verifier's errors: to be completed by the room."""

from __future__ import annotations

from chutes_proto import ChutesError


class QuoteError(ChutesError):
    """Root of everything that the verifier raises on purpose."""
