"""Install with pip and show how far it is: ``python -m tools.pip_progress [OPTION]... REQUIREMENTS``.

A counter in a terminal; in a log, a line for every fifth of the packages. Everything that pip says is shown where it
fails. Runs before anything is installed, so it needs nothing but pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Final

PACKAGES: Final = Path(sysconfig.get_path("purelib"))


class Counter:
    """Shows a growing number of packages."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._shown = 0
        self._began = time.monotonic()

    def show(self, what: str, count: int) -> None:
        """Rewrite the line in a terminal; elsewhere write one now and then."""
        step = 1 if sys.stdout.isatty() else max(self._total // 5, 1)
        if count // step != self._shown // step:
            text = f"    {what} {count:3} of {self._total}, {time.monotonic() - self._began:.0f} s"
            print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, end="" if step == 1 else "\n", flush=True)
        self._shown = count


def main(options: list[str], requirements: str) -> int:
    total = len(re.findall(r"^[A-Za-z0-9][^=\s]*==", Path(requirements).read_text("utf-8"), re.MULTILINE))
    counter = Counter(total)
    count = 0
    said: list[str] = []
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *options, "-r", requirements]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line)
            if line.startswith(("Collecting ", "Ignoring ", "Requirement already satisfied: ")):
                count += 1
                counter.show("fetched  ", count)
            elif line.startswith("Installing collected packages"):
                break  # from here on pip says nothing until the end, but each package that is there can be counted
        there = len(list(PACKAGES.glob("*.dist-info")))
        counter = Counter(line.count(",") + 1)
        while pip.poll() is None:
            time.sleep(0.2)
            counter.show("installed", len(list(PACKAGES.glob("*.dist-info"))) - there)
        said += pip.stdout
    print(end="\n" if sys.stdout.isatty() else "")
    if pip.returncode:
        print("".join(said), file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:-1], sys.argv[-1]))
