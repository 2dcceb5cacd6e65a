"""Rows of the reference system's table of keys, whose passphrases Fernet encrypts.

An error of a row repeats no secret.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from typing import Any, cast

from cryptography.fernet import Fernet, InvalidToken

from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.errors import QuoteError
from chutes_proto.keys.vault import FreshKey
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import open_quote
from chutes_proto.secret import Secret
from chutes_proto.store._rows import Platform, Vm
from chutes_proto.wire.names import NAME_PATTERN, NAME_RULE


def read_row(
    content: object, fernet: Fernet, root: TrustedRoot, served: tuple[str, ...]
) -> tuple[Vm, dict[str, FreshKey], Platform | None]:
    """One VM of the reference system. Raises `ValueError`, whose text repeats no secret."""
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - what a line holds is a value
    given = cast("dict[str, Any]", content)
    hotkey, name, tokens = (given.get(key) for key in ("miner_hotkey", "vm_name", "volume_passphrases"))
    if not isinstance(hotkey, str) or not isinstance(name, str) or not isinstance(tokens, dict):
        raise ValueError(  # noqa: TRY004
            "it takes the texts miner_hotkey and vm_name, and the object volume_passphrases"
        )
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise ValueError(f"vm_name {name[:200]!r}: no boot can be of this name; a VM's name is {NAME_RULE}")
    try:
        _ = Hotkey.parse(hotkey)
    except HotkeyError as exc:
        raise ValueError(f"miner_hotkey {hotkey[:200]!r} is not a hotkey: {exc}") from None
    keys: dict[str, FreshKey] = {}
    for volume, token in cast("dict[str, object]", tokens).items():
        if volume not in served:
            raise ValueError(f"volume {volume[:200]!r} is not among the server's volumes: {', '.join(served)}")
        try:
            passphrase = fernet.decrypt(str(token).encode("ascii", "replace"))
        except InvalidToken:
            raise ValueError(f"the token of volume {volume!r} does not open under this Fernet key") from None
        if not passphrase or not passphrase.isascii() or not passphrase.decode("ascii").isprintable():
            raise ValueError(f"the passphrase of volume {volume!r} is not printable ASCII")
        keys[volume] = FreshKey.of_passphrase(Secret(passphrase), os.urandom(FreshKey.SIZE))
    return Vm(hotkey, name), keys, _platform(given.get("boot_quote"), root)


def _platform(quote: object, root: TrustedRoot) -> Platform | None:
    """The platform of a boot quote, whose PCK certificate must lead to the server's root."""
    if quote is None:
        return None
    try:
        pck = open_quote(base64.b64decode(str(quote), validate=True), now=int(time.time()), root=root).pck
    except (binascii.Error, QuoteError) as exc:
        raise ValueError(f"boot_quote: {exc}") from None
    return Platform(instance_id=pck.platform_instance_id, ppid=pck.ppid)
