"""Fuzz each target for a while; ``python -m tests.fuzz --seconds 60 quote http``.

Each target runs in a process of its own and keeps what it found interesting in ``.fuzz/NAME/corpus``, so that a later
run goes on from there. An input that breaks a promise stays as ``.fuzz/NAME/crash-…``; give its path to ``--replay``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".fuzz")
MAX_LENGTH = 64 * 1024
GRACE = 300
"""Seconds that a process may need beyond its time, on a busy machine, to import what it tests and to write figures."""


def fuzz_here(name: str, seconds: int) -> None:
    """Fuzz one target; this does not return."""
    import atheris

    with atheris.instrument_imports(include=["chutes_proto", "h11", "json"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = FOLDER / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        _ = (corpus / f"seed-{hashlib.sha256(seed).hexdigest()[:16]}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}", "-timeout=10", "-rss_limit_mb=2048"]
    prefix = f"-artifact_prefix={FOLDER / name}/"
    atheris.Setup([sys.argv[0], *options, prefix, "-print_final_stats=1", str(corpus)], target.check)
    atheris.Fuzz()


def fuzz_apart(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own, print the outcome, and return whether every promise was kept."""
    command = [sys.executable, "-m", "tests.fuzz", "--here", "--seconds", str(seconds), name]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=seconds + GRACE)
    except subprocess.TimeoutExpired:
        print(f"{name:<14} FAILED: it did not end {GRACE} s after its time", flush=True)
        return False
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    if done.returncode != 0:
        told = [line for line in output.splitlines() if not re.match(r"#\d+\s|INFO: ", line)]
        print(f"{name:<14} FAILED", *told, sep="\n", flush=True)
        return False
    runs = re.search(r"number_of_executed_units: *(\d+)", output)
    print(f"{name:<14} {runs[1] if runs else '?':>10} inputs, no promise broken", flush=True)
    return True


def main() -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    _ = parser.add_argument("--seconds", type=int, default=60, help="how long each target runs (%(default)s)")
    _ = parser.add_argument("--replay", type=Path, metavar="FILE", help="check one input against the one target named")
    _ = parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    _ = parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; all when none is named")
    options = parser.parse_args()
    names: list[str] = options.names or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; choose of: {', '.join(TARGETS)}")
    if options.replay is not None:
        if len(options.names) != 1:
            parser.error("--replay takes exactly one target")
        TARGETS[names[0]].check(options.replay.read_bytes())
        return 0
    broken = [name for name in names if not fuzz_apart(name, options.seconds)]
    return 1 if broken else 0


if __name__ == "__main__":
    if "--here" in sys.argv[1:2]:
        fuzz_here(name=sys.argv[4], seconds=int(sys.argv[3]))
    else:
        sys.exit(main())
