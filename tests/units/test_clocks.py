"""No nonce is redeemed twice, whatever the clocks of servers do; and a clock that is right again mends all."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import pytest
from attrs import evolve, frozen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from chutes_proto.errors import Refusal
from chutes_proto.secret import Secret
from chutes_proto.server._nonces import RANDOM_SIZE, MacKey, NonceMint
from chutes_proto.server._tags import TagKey
from chutes_proto.store._rows import ReadTimes, StoreOp, Times
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import DAY, NOW
from chutes_proto.units.nonces import SKEW, ForgetNonces, Nonce, RaiseHorizon, redeem_nonce, why_void
from chutes_proto.units.operator import StoreRestored
from tests.store.memory import MemoryStore

T = TypeVar("T")

MINT = NonceMint((MacKey(5, TagKey(Secret(b"k" * 32))),))
SERVERS = range(3)
STEPS = 60

some_server = st.sampled_from(SERVERS)
some_offset = st.sampled_from([0, 0, 30, 60, 61, -30, -700, DAY, 2 * DAY, 10 * DAY, -DAY, -10 * DAY])
some_seconds = st.sampled_from([1, 30, 60, 61, 600, 3600, DAY - 60, DAY, DAY + 700, 10 * DAY])


@frozen
class Redeem(Unit[None]):
    nonce: bytes
    issued_at: int
    now: int

    def script(self) -> Script[None]:
        yield from redeem_nonce(Nonce(self.nonce, "boot", self.issued_at), self.now)


class ClockedStore(MemoryStore):
    """A store that may have a clock of its own, as PostgreSQL has."""

    clock: int | None = None

    def perform(self, op: StoreOp[Any]) -> Any:
        reply = super().perform(op)
        return evolve(reply, clock=self.clock) if isinstance(reply, Times) else reply


class Nonces(RuleBasedStateMachine):
    """Servers that issue, redeem and sweep, and an operator who restores backups."""

    def __init__(self) -> None:
        super().__init__()
        self.store = ClockedStore()
        self.time = NOW
        self.offsets = [0 for _ in SERVERS]
        self.numbers = itertools.count()
        self.issued: list[str] = []
        self.redeemed: dict[str, int] = {}
        self.backups: list[bytes] = []

    def now(self, server: int) -> int:
        return self.time + self.offsets[server]

    def transact(self, unit: Unit[T]) -> T:
        return self.store.transact(unit)

    def redeems(self, server: int, text: str) -> bool:
        try:
            nonce = MINT.check(text, "boot", self.now(server))
            self.transact(Redeem(nonce.value, nonce.issued_at, self.now(server)))
        except Refusal:
            return False
        assert text not in self.redeemed, "a nonce was redeemed twice"
        self.redeemed[text] = nonce.issued_at
        return True

    def boots(self, server: int) -> bool:
        self.issue(server)
        return self.redeems(server, self.issued[-1])

    @rule(seconds=some_seconds)
    def wait(self, seconds: int) -> None:
        self.time += seconds

    @rule(server=some_server)
    def issue(self, server: int) -> None:
        random = next(self.numbers).to_bytes(RANDOM_SIZE, "big")
        self.issued.append(MINT.issue("boot", self.now(server), random).hex())

    @precondition(lambda self: self.issued)
    @rule(server=some_server, which=st.integers(-5, 200))
    def redeem(self, server: int, which: int) -> None:
        _ = self.redeems(server, self.issued[which % len(self.issued)])

    @precondition(lambda self: self.redeemed)
    @rule(server=some_server, which=st.integers(0, 200), age=st.integers(-60, 600))
    def replay(self, server: int, which: int, age: int) -> None:
        """By a server whose clock says that the nonce is of an acceptable age."""
        text = sorted(self.redeemed)[which % len(self.redeemed)]
        self.turn(server, self.redeemed[text] + age - self.time)
        assert not self.redeems(server, text)

    @rule(server=some_server)
    def sweep(self, server: int) -> None:
        _ = self.transact(RaiseHorizon(self.now(server)))
        _ = self.transact(ForgetNonces(self.now(server)))

    @rule()
    def back_up(self) -> None:
        self.backups.append(self.store.image())

    @precondition(lambda self: self.backups)
    @rule(which=st.integers(0, 9), server=some_server)
    def restore(self, which: int, server: int) -> None:
        self.store = ClockedStore(self.backups[which % len(self.backups)])
        self.store_restored(server)

    def turn(self, server: int, offset: int) -> None:
        raise NotImplementedError

    def store_restored(self, server: int) -> None:
        raise NotImplementedError


class SeveralMachines(Nonces):
    """Each server has a clock of its own, wrong or right; the database has a right one."""

    def __init__(self) -> None:
        super().__init__()
        self.void_until = 0

    def transact(self, unit: Unit[T]) -> T:
        self.store.clock = self.time
        return super().transact(unit)

    @rule(server=some_server, offset=some_offset)
    def turn(self, server: int, offset: int) -> None:
        self.offsets[server] = offset

    @rule(server=some_server)
    def boot(self, server: int) -> None:
        granted = self.boots(server)
        if self.offsets[server] == 0:
            assert granted == (self.time > self.void_until), "wrong clocks change nothing for a right one"

    @rule(server=some_server)
    def store_restored(self, server: int) -> None:
        self.void_until = self.transact(StoreRestored(self.now(server))).horizon
        assert self.void_until == self.time + SKEW
        assert max(self.redeemed.values(), default=0) <= self.void_until, "no redemption that may be lost is uncovered"

    @invariant()
    def the_horizon_is_a_days_age_or_of_a_restore(self) -> None:
        assert self.store.transact(Ask(ReadTimes())).horizon <= max(self.void_until, self.time - DAY)


class OneMachine(Nonces):
    """All servers have one clock, and the store has none, as with a file in SQLite."""

    @rule(server=some_server, offset=some_offset)
    def turn(self, server: int, offset: int) -> None:
        self.offsets = [offset for _ in SERVERS]

    @rule(server=some_server)
    def boot(self, server: int) -> None:
        _ = self.boots(server)

    @rule(server=some_server)
    def store_restored(self, server: int) -> None:
        horizon = self.transact(StoreRestored(self.now(server))).horizon
        assert horizon == self.now(server) + SKEW
        # Of nonces that a clock has dated beyond it, docs/how-to/backup-restore.md warns.
        self.redeemed = {text: at for text, at in self.redeemed.items() if at <= horizon}
        self.time += SKEW + 1
        assert self.boots(server), "a minute after a restore"


@pytest.mark.parametrize("machine", [SeveralMachines, OneMachine])
def test_no_nonce_is_redeemed_twice(machine: type[Nonces]) -> None:
    run_state_machine_as_test(machine, settings=settings(settings(), stateful_step_count=STEPS))


@pytest.mark.parametrize(
    ("times", "text"),
    [
        (Times(NOW, NOW), "as after `chutes-proto store restored`"),
        (Times(NOW + 2 * SKEW, None), "a clock was ahead"),
        (Times(NOW + 2 * SKEW, NOW + 2 * SKEW), "set this server's right"),
    ],
)
def test_an_operator_hears_which_clock_is_wrong(times: Times, text: str) -> None:
    assert text in str(why_void(times, NOW))
