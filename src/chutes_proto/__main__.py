"""``python -m chutes_proto`` is ``chutes-proto``."""

import sys

from chutes_proto.cli.main import program

sys.exit(program())
