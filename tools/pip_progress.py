"""Install with pip and show how far it is: ``python -m tools.pip_progress [OPTION]... REQUIREMENTS``.

A counter in a terminal; in a log, a line for every tenth of the packages. Everything that pip says is shown where it
fails. Runs before anything is installed, so it needs nothing but pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path


def main(options: list[str], requirements: str) -> int:
    total = len(re.findall(r"^[A-Za-z0-9][^=\s]*==", Path(requirements).read_text("utf-8"), re.MULTILINE))
    tenth = max(total // 10, 1)
    began = time.monotonic()
    count = 0
    lines: list[str] = []

    def show(text: str, *, last: bool = False) -> None:
        text = f"    {text}  {time.monotonic() - began:.0f} s"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)

    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *options, "-r", requirements]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None  # noqa: S101 (it is a pipe)
        for line in pip.stdout:
            lines.append(line)
            if line.startswith(("Collecting ", "Ignoring ", "Requirement already satisfied: ")):
                count += 1
                if sys.stdout.isatty() or count % tenth == 0:
                    show(f"{count:3} of {total} packages")
            elif line.startswith("Installing collected packages"):
                show("unpacking all of them")
    if pip.returncode:
        print("".join(["\n", *lines]), file=sys.stderr)
    else:
        show("installed", last=True)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:-1], sys.argv[-1]))
