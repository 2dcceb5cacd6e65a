"""Verify a quote with Intel's collateral; print the image of the TD if the policy accepts it, otherwise the reason.

python examples/verify_quote.py quote.bin collateral.json policy.toml REPORT_DATA_IN_HEX [root.der]

The last argument is a root to trust instead of Intel's, such as the one that `chutes-proto simulate` writes.
"""

import sys
import time
from pathlib import Path

from chutes_proto.quote import INTEL_ROOT, Collateral, Policy, TrustedRoot, VerificationError, verify


def main(quote, collateral, policy, report_data, root=None):
    try:
        verdict = verify(
            Path(quote).read_bytes(),
            Collateral.load(collateral),
            now=int(time.time()),
            report_data=bytes.fromhex(report_data),
            policy=Policy.load(policy),
            root=TrustedRoot.from_der(Path(root).read_bytes()) if root else INTEL_ROOT,
        )
    except VerificationError as exc:
        return f"refused: {exc.code} (step {exc.step}, got {exc.got}, expected {exc.expected})"
    name = verdict.matched.name if verdict.matched else "any image (measurements unchecked)"
    print(f"accepted: {name}, MRTD {verdict.to_dict()['mr_td']}, TCB {verdict.tcb_status}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        raise SystemExit(f"usage: {sys.argv[0]} QUOTE COLLATERAL_JSON POLICY_TOML REPORT_DATA_IN_HEX [ROOT_DER]")
    sys.exit(main(*sys.argv[1:]))
