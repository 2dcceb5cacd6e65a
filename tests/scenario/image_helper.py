"""The program that an image has besides its script: it signs with the hotkey of the config volume, and quotes."""

from __future__ import annotations

import base64
import sys

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.secret import Secret
from chutes_proto.testing._platform import SimulatedPlatform

PLATFORM = SimulatedPlatform(bytes(32))
PAIR = HotkeyPair.from_seed(Secret(bytes(range(32))))
OF_ANOTHER = HotkeyPair.from_seed(Secret(bytes(32)))


def main(what: str, *words: str) -> None:
    if what == "sign":
        print(PAIR.sign(words[0].encode()).hex())
    else:
        data = bytes.fromhex(words[1])
        quote = PLATFORM.quote(data, stage="boot") if words[0] == "boot" else PLATFORM.quote(data, stage="runtime")
        print(base64.b64encode(quote).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
