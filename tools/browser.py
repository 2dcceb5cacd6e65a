"""A headless Chromium, driven over a pipe by its DevTools protocol: no further package.

Source: the DevTools protocol, https://chromedevtools.github.io/devtools-protocol/; ``--remote-debugging-pipe`` reads
JSON with a zero byte after each message from descriptor 3, and writes to descriptor 4.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import F_DUPFD, fcntl
from itertools import count
from pathlib import Path
from typing import Any, Final

from attrs import define, field

SECONDS: Final = 120.0
PAUSE_SECONDS: Final = 0.05
_NUMBERED: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@define
class Browser:
    """One page. ``events`` are what the browser told meanwhile: requests, messages of the console, exceptions."""

    _writing: int
    _reading: int
    events: list[dict[str, Any]] = field(init=False, factory=list)
    _session: dict[str, str] = field(init=False, factory=dict)
    _numbers: count[int] = field(init=False, factory=count)
    _buffer: bytes = field(init=False, default=b"")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method. Raises `RuntimeError` for an error of the browser's."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | self._session
        _ = os.write(self._writing, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> None:
        """Open the page at ``url``, and note what it asks for and says."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            _ = self.call(f"{domain}.enable")
        _ = self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page. Raises `RuntimeError` if it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The first true value of an expression. Raises `TimeoutError`."""
        end = time.monotonic() + SECONDS
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(PAUSE_SECONDS)
        return value

    def wait_for(self, method: str) -> dict[str, Any]:
        """The first event of a kind. Raises `TimeoutError`."""
        end = time.monotonic() + SECONDS
        while not (found := [event for event in self.events if event.get("method") == method]):
            if time.monotonic() > end:
                raise TimeoutError(method)
            _ = self.evaluate("0")
        return found[0]

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key, by its name and number; ``text`` is what it writes."""
        named: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        _ = self.call("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        _ = self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def show(self, *, dark: bool, width: int = 1280, height: int = 900) -> None:
        """Set the theme that the user prefers, and the size of the window."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        _ = self.call("Emulation.setEmulatedMedia", features=[feature])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        _ = self.call("Emulation.setDeviceMetricsOverride", **size)

    def picture(self) -> bytes:
        """The whole page as PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return b64decode(taken["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._reading, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


def _end_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@contextmanager
def browser(program: str) -> Generator[Browser]:
    """Start ``program``, a Chromium, with an empty profile; it ends with the block."""
    with ExitStack() as opened:
        profile = opened.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        _ = opened.callback(os.close, ours_out)
        _ = opened.callback(os.close, ours_in)
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        quiet = "--disable-background-networking --disable-component-update --disable-extensions --hide-scrollbars"
        command = [program, *flags.split(), *quiet.split(), f"--user-data-dir={profile}", "about:blank"]
        theirs = [fcntl(each, F_DUPFD, 10) for each in (theirs_in, theirs_out)]  # not 3 or 4 already
        numbered = [sys.executable, "-I", "-c", _NUMBERED, *map(str, theirs), *command]
        with Path(os.devnull).open("wb") as nowhere:
            process = subprocess.Popen(
                numbered,
                stdout=nowhere,
                stderr=nowhere,
                pass_fds=theirs,
                env={**os.environ, "TMPDIR": profile},  # where it leaves a folder when it is ended
                start_new_session=True,
            )
        _ = opened.callback(_end_group, process.pid)  # its helpers would write the profile again
        _ = opened.callback(process.wait)
        _ = opened.callback(process.terminate)
        for each in (theirs_in, theirs_out, *theirs):
            os.close(each)
        yield Browser(ours_out, ours_in)
