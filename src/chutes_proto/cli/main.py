"""The command ``chutes-proto``: which half runs a command line, and an exit code for every way to end.

Rules kept here:

* exit code 0: done, granted, accepted; 1: refused; 2: wrong usage, a file that cannot be opened, or a result that
  cannot be written; a command's help says what else it means by them;
* an error is readable and says what to do, never a traceback; an interruption ends quietly;
* a result that cannot be written is an error, also where standard output is closed; a server and a boot go on;
* `agent` runs in an initramfs: argparse reads its options, and neither click nor rich is imported for it;
* an extra that is not installed is named here, for every command.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal, TextIO

from chutes_proto._error import ChutesError
from chutes_proto.cli import console


def program() -> int:
    """Run the command line of this process, which ends with the result."""
    if sys.argv[1:2] == ["serve"]:
        import signal

        # Until a server handles it, it would end the process, which systemd takes for a clean end: no restart follows.
        _ = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    code = main()
    try:
        _ = sys.stderr.flush()
    except OSError:  # Python would try once more, and give the process an exit code of its own
        _ = os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    # Before it ends, Python looks for cycles among all that was imported: a quarter of the time that a command takes.
    gc.freeze()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the result is the exit code of the process."""
    return guarded(_run, sys.argv[1:] if argv is None else argv)


def guarded(run: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """The exit code of ``run``, or that of the error that ended it, which is printed."""
    # A service may be started without; of another command the output is the result. To read alone: writing fails.
    goes_on = words[:1] in (["serve"], ["agent"]) or words[:2] == ["collateral", "serve"]
    missing = os.O_WRONLY if goes_on else os.O_RDONLY
    # In this order each gets the number of the one that is missing: a disk would get it otherwise, and on it whatever a
    # library writes to descriptor 2.
    sys.stdin = sys.stdin or _in_place(os.O_RDONLY, "r")
    sys.stdout = sys.stdout or _in_place(missing, "w")
    sys.stderr = sys.stderr or _in_place(os.O_WRONLY, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(words)
        console.out("", end="")
    except OSError as exc:
        # The rest of the buffer of standard output would fail again when Python ends.
        _ = os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):  # the reader has seen enough
            return console.BROKEN_PIPE
        from chutes_proto.io.files import shown

        console.complain(f"{shown(exc.filename)}: {exc.strerror}" if exc.filename else str(exc))
        return console.USAGE
    except KeyboardInterrupt:
        return console.INTERRUPTED
    except ChutesError as exc:
        console.complain(str(exc), _named(words))
        return console.USAGE
    except RuntimeError as exc:
        if str(exc) != "can't start new thread":  # Python's word for the limit of the system
            raise
        console.complain(
            f"{exc}; let the system allow more (TasksMax= of systemd, a container's --pids-limit, ulimit -u)"
        )
        return console.USAGE
    except ModuleNotFoundError as exc:
        from chutes_proto.cli.extras import advice, extra_of

        extra = extra_of(exc.name or "")
        if extra is None:
            raise
        console.complain(advice(extra))
        return console.USAGE
    return code


def _named(words: Sequence[str]) -> str:
    """The command, whose help says more; only the tree knows how many words name one."""
    if words[:1] == ["agent"] or not sys.stderr.isatty():
        return " ".join(["chutes-proto", *words[:1]])
    from chutes_proto.cli.tree import words_of

    return words_of(words)


def _in_place(flags: int, mode: Literal["r", "w"]) -> TextIO:
    """A stream in place of one that the process was started without (``>&-``); programs that it starts get it, too."""
    descriptor = os.open(os.devnull, flags)
    os.set_inheritable(descriptor, True)
    return os.fdopen(descriptor, mode, encoding="utf-8")


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["agent"]:
        from chutes_proto.cli.agent import main as run_agent

        return run_agent(words[1:])
    from chutes_proto.cli.tree import run

    return run(words)
