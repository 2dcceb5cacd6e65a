"""A million verdicts in a row: memory must not grow once all machines have been seen.

Nine of ten are of few machines, whose PCK chains and quoting enclaves are cached; the tenth is of more machines than
the cache holds, so that entries are evicted; now and then collateral is verified again. Ratios are to the resident
memory after the first tenth.
"""

from __future__ import annotations

from time import perf_counter

from bench.measure import one_core, resident
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import check_signed, open_quote, verify_collateral, verify_quote
from chutes_proto.testing._platform import SimulatedPlatform

VERDICTS = 1_000_000
MACHINES = 300
FEW = 16
REVERIFY = 1000
"""After so many verdicts, the collateral of a machine is verified again."""
NOW = 1_800_000_000


def run() -> None:
    one_core()
    machines = [SimulatedPlatform(b"a world of many machines", index=index) for index in range(MACHINES)]
    root = TrustedRoot.from_der(machines[0].root_der)
    quotes = [machine.quote(bytes(64)) for machine in machines]
    collateral: list[Collateral] = [machine.collateral(NOW) for machine in machines]
    verified: list[VerifiedCollateral] = [verify_collateral(piece, now=NOW, root=root) for piece in collateral]
    sizes: list[int] = []
    start = perf_counter()
    for number in range(VERDICTS):
        which = number // 10 % MACHINES if number % 10 == 0 else number % FEW
        if number % REVERIFY == 0:
            verified[which] = verify_collateral(collateral[which], now=NOW, root=root)
        signed = check_signed(open_quote(quotes[which], now=NOW, root=root))
        _ = verify_quote(signed, verified[which], now=NOW, report_data=None)
        if (number + 1) % (VERDICTS // 10) == 0:
            sizes.append(resident())
    rate = VERDICTS / (perf_counter() - start)
    if not sizes[0]:
        print("memory: this system does not report resident memory")
        return
    shown = " ".join(f"{size / sizes[0]:.3f}" for size in sizes)
    print(f"memory: {VERDICTS} verdicts of {MACHINES} machines, {rate:.0f} a second; resident after each tenth, in")
    print(f"  ratios to the first ({sizes[0]} kB): {shown}")
