"""A volume and its disk."""

from __future__ import annotations

import re
from typing import Final, cast

from attrs import frozen

from chutes_proto.errors import LocalProtocolError

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@frozen
class Volume:
    """A volume by its name in the exchange, its device, and the name of its mapping in ``/dev/mapper``.

    Raises `LocalProtocolError` for impossible names, and for a device that is not an absolute path.
    """

    name: str
    device: str
    mapping: str = ""

    def __attrs_post_init__(self) -> None:
        if not self.mapping:
            object.__setattr__(self, "mapping", self.name)
        for name in (self.name, self.mapping):
            if not _NAME.fullmatch(name) or name == "control":
                raise LocalProtocolError(f"{name!r} is not a volume's name: letters, digits, '_', '.', '-', at most 64")
        device = cast("object", self.device)  # a caller without a type checker may pass a Path
        if not isinstance(device, str) or not device.startswith("/"):
            raise LocalProtocolError(f"the device of {self.name} must be an absolute path as a string, not {device!r}")
