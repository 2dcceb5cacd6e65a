"""Work beside the requests of a server, which does not end: what stops it for a while does not stop the server.

The system may allow no further thread, and rows that somebody has changed may show a defect of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import anyio

from chutes_proto.errors import where_raised
from chutes_proto.log import Level, Record

PAUSE_SECONDS: Final = 5.0
LASTING_SECONDS: Final = 60.0
"""Work that went on for so long is no longer about the exception before."""


async def keep_at(work: Callable[[], Awaitable[object]], log: Callable[[Record], None]) -> NoReturn:
    """Do ``work``, which does not end by itself; begin it again `PAUSE_SECONDS` after an exception.

    The exception is logged, but not again and again.
    """
    told = ""
    while True:
        began = anyio.current_time()
        try:
            _ = await work()
        except Exception as exc:  # noqa: BLE001 - the server goes on
            text = f"{exc}; " if isinstance(exc, (OSError, RuntimeError)) else ""  # of others it may repeat a row
            found = text + where_raised(exc)
            if found != told or anyio.current_time() - began > LASTING_SECONDS:
                log(Record(Level.ERROR, "background_failed", {"error": found}))
            told = found
        await anyio.sleep(PAUSE_SECONDS)
