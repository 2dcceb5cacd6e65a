"""``python -m chutes_proto`` is ``chutes-proto``."""

import sys

from chutes_proto.cli.main import main

sys.exit(main())
