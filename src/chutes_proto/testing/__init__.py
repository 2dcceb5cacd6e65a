"""Parts of tests, for this project and its users: a simulated TDX platform, simulated GPUs, playbooks, a store suite.

platform = SimulatedPlatform(b"the world of my tests")
quote, collateral, root = platform.quote(report_data), platform.collateral(now), platform.root
faulty = platform.having("debug").quote(report_data)
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.testing._gpus import SimulatedGpus
    from chutes_proto.testing._platform import SimulatedPlatform
    from chutes_proto.testing._playbook import Playbook, PlaybookError
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.testing._gpus": "SimulatedGpus",
            "chutes_proto.testing._platform": "SimulatedPlatform",
            "chutes_proto.testing._playbook": "Playbook PlaybookError",
        },
    )

__all__ = ["Playbook", "PlaybookError", "SimulatedGpus", "SimulatedPlatform"]
