"""Prints what the tests covered, room by room, and fails where the core is below its floor.

Run after the tests, as ``python tests/coverage_floor.py PERCENT``. coverage's own floor mixes statements and branches,
so a file of many statements would hide branches that no test takes; this one counts both, each by itself.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import PurePath
from tempfile import NamedTemporaryFile

from coverage import Coverage

COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")
EDGE = ("io", "cli", "__main__")
"""Parts of the core package that are not core: I/O, tested as programs and over real sockets."""
WHOLE = ("auth", "gpu", "keys", "quote", "units", "wire")
"""Packages of which the tests cover every branch: an untested rule is not kept."""
FLOOR = 85.0
"""Percent of statements and of branches that every package has; much of io and cli runs in processes of its own."""


def room_of(file: str) -> tuple[str, ...]:
    """The package, and in the core package the room, that a source file belongs to."""
    parts = PurePath(file).with_suffix("").parts
    parts = parts[parts.index("src") + 1 :]
    return parts[: 2 if parts[0] == "chutes_proto" and len(parts) > 2 else 1]


def percent(covered: int, total: int) -> float:
    return 100.0 * covered / total if total else 100.0


def main(floor: float) -> int:
    coverage = Coverage()
    coverage.load()
    with NamedTemporaryFile("r", suffix=".json") as report, redirect_stdout(io.StringIO()):
        _ = coverage.json_report(outfile=report.name)
        files = json.load(report)["files"]

    rooms: dict[str, Counter[str]] = {}
    core: Counter[str] = Counter()
    for file, data in files.items():
        room = room_of(file)
        counts = Counter({key: data["summary"][key] for key in COUNTS})
        rooms.setdefault(".".join(room), Counter()).update(counts)
        if room[0] == "chutes_proto" and room[1:2] not in [(edge,) for edge in EDGE]:
            core.update(counts)
    rooms = dict(sorted(rooms.items()))
    rooms["the core"] = core

    print(f"{'covered, in percent':<32}{'statements':>12}{'branches':>12}")
    partial: list[str] = []
    low: list[str] = []
    for name, c in rooms.items():
        if name.removeprefix("chutes_proto.") in WHOLE and c["covered_branches"] < c["num_branches"]:
            partial.append(name)
        statements = percent(c["covered_lines"], c["num_statements"])
        branches = percent(c["covered_branches"], c["num_branches"])
        if min(statements, branches) < FLOOR:
            low.append(name)
        print(f"{name:<32}{statements:>12.1f}{branches:>12.1f}")
    if min(statements, branches) < floor:
        print(f"the core is below its floor of {floor:g} percent; `coverage report` names the lines", file=sys.stderr)
        return 1
    if low:
        print(f"below its floor: {', '.join(low)}; `coverage report` names the lines", file=sys.stderr)
        return 1
    if partial:
        told = ", ".join(partial)
        print(f"not every branch is taken in {told}; `coverage report --show-missing` names the lines", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
