"""Tools that have a machine's GPUs make evidence: a program on the machine, or simulated GPUs."""

from __future__ import annotations

import re
from typing import Final

from chutes_proto.boot._quoter_names import COMMAND
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.quoters.choose import GpuTool
from chutes_proto.io.quoters.command import CommandQuoter

MAX_EVIDENCE: Final = 1024 * 1024
SECONDS: Final = 60.0
"""The time that a program may take: some ask the GPUs one after the other."""

_SIMULATED: Final = re.compile(r"simulated(?::([1-9][0-9]?))?")


def make_gpu_tool(text: str) -> GpuTool:
    """Return the tool that ``text`` names.

    ``command:LINE``, or any other text
        a program that gets the nonce in hex on its standard input and in place of ``{nonce}``, and writes the evidence
        as JSON to its standard output, on the last line or on all, or to the file ``{output}``; no shell runs
    ``simulated``, ``simulated:N``
        N simulated GPUs, one unless N is said, which no server trusts but for trials

    Raises `ConfigurationError` for a command that cannot be run.
    """
    simulated = _SIMULATED.fullmatch(text)
    if simulated is None:
        command = text.removeprefix(COMMAND)
        return CommandQuoter(command, timeout=SECONDS, what="GPU evidence", data="nonce", most=MAX_EVIDENCE)
    from chutes_proto.testing._gpus import SIMULATED_SEED, SimulatedGpus

    try:
        return SimulatedGpus(SIMULATED_SEED, count=int(simulated[1] or 1)).evidence_json
    except ValueError as exc:
        raise ConfigurationError(f"gpu tool: {exc}") from None
