"""Quoters, one a file. `chutes_proto.io.quoters.choose` chooses among them."""

from typing import Final

MAX_QUOTE: Final = 48 * 1024
"""The longest quote in bytes: in base64 it fits into the 64 KiB body that a server reads."""
