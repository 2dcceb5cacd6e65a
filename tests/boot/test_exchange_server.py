"""The exchange table against a real server: in every state, what the server answers leads where the table says.

The machine below takes one step of the client after the other, in any order that the table has, over a network that
loses messages, with a server whose store is busy at times and whose tokens die. After each step the server's rows must
be what the client's state claims of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from attrs import evolve
from cryptography.x509 import load_pem_x509_certificate
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.boot._exchange import Exchange, Input, State, failure
from chutes_proto.boot._flows import (
    BootGrant,
    BootSettings,
    attest_boot,
    fetch_nonce,
    make_quote,
    read_cache_passphrase,
    sync_volumes,
)
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Effect, Flow, Transact, run
from chutes_proto.errors import QuoteUnavailable, Refusal, StoreBusy, TransportError
from chutes_proto.secret import Secret
from chutes_proto.store._rows import BootRow, GenerationRow, NonceRow, Row
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.network import Fate, SimulatedNetwork
from tests.server.world import HOTKEY, NOW, World

T = TypeVar("T")
R = TypeVar("R", bound=Row)

VOLUMES = ("storage", "tdx-cache")
BLANK = dict.fromkeys(VOLUMES, False)
NO_KEY = (404, "key_not_found")
TOKEN_GONE = (401, "boot_token_invalid")
FATES = [fate.value for fate in Fate]
HARMLESS = ("none", Fate.DELIVERED.value, Fate.DOUBLED.value)
FAULTS = ["rtmr1", "debug"]
ONCE = RetryPolicy(attempts=1)
IDENTITY = make_client_identity(NOW, bytes(32))
CERTIFICATE = load_pem_x509_certificate(IDENTITY.certificate_pem)
SETTINGS = BootSettings(HOTKEY, "vm-1", IDENTITY.spki_sha256)

MISHAPS = st.sampled_from(["none", "none", "none", *(fate.value for fate in Fate), "store busy"])


def when(*states: State) -> Callable[[Any], Any]:
    return precondition(lambda machine: machine.exchange.state in states)


def refuse_transactions(effect: Effect[Any]) -> None:
    if isinstance(effect, Transact):
        raise StoreBusy("locked")


class Boots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(certificate=CERTIFICATE)
        self.network = SimulatedNetwork(self.serve, quoter=self.quote, fates=self.fates(), started=NOW)
        self.mishap = "none"
        self.exchange = Exchange()
        self.nonce = self.quoted = b""
        self.asked_at, self.is_faulty = 0, False
        self.grant: BootGrant | None = None
        self.taken: bytes | None = None  # the digest of the sync that the server answered on the held token
        self.keys: dict[str, Secret] = {}  # as they were received first

    # --- the world ---

    def fates(self) -> Iterator[Fate]:
        while True:
            yield Fate(self.mishap) if self.mishap in FATES else Fate.DELIVERED

    def quote(self, report_data: bytes) -> bytes:
        if self.mishap == "no quote":
            raise QuoteUnavailable("the quoting service is busy")
        platform = self.world.platform
        return (platform.having(self.mishap) if self.mishap in FAULTS else platform).quote(report_data)

    def serve(self, request: HttpRequest) -> HttpResponse:
        world = self.world
        world.now, world.uptime = self.network.wall_clock, self.network.elapsed
        world.before = refuse_transactions if self.mishap == "store busy" else lambda _: None
        whole = evolve(request, peer_certificate=CERTIFICATE, peer_address="192.0.2.1", arrived=world.uptime)
        response = run(world.app.handle(whole), world.perform)
        self.network.wait(world.uptime - self.network.elapsed)
        if (request.method, response.status) == ("POST", 200) and request.target.endswith("/luks"):
            self.taken = hashlib.sha256(request.body).digest()
        return response

    def step(self, flow: Flow[T], done: Input, mishap: str = "none") -> T | None:
        """Take one step of the client and tell the machine its outcome, which the table must have."""
        self.mishap = mishap
        try:
            brought = run(flow, self.network.perform)
        except (Refusal, TransportError, QuoteUnavailable) as exc:
            _ = self.exchange.take(failure(self.exchange.state, exc))
            return None
        _ = self.exchange.take(done)
        return brought

    def refused(self, flow: Flow[object]) -> tuple[int, str]:
        """The server's answer to a step that the table does not have; the machine hears nothing of it."""
        self.mishap = "none"
        try:
            _ = run(flow, self.network.perform)
        except Refusal as exc:
            return exc.status, str(exc.code)
        raise AssertionError("the server granted what the table does not have")

    def held(self) -> BootGrant:
        assert self.grant is not None
        return self.grant

    def boot_row(self) -> BootRow:
        token = self.held().boot_token
        assert token is not None
        digest = hashlib.sha256(token.reveal()).digest()
        (row,) = [row for row in self.rows(BootRow) if row.token_digest == digest]
        return row

    def token_lives(self) -> bool:
        return self.network.wall_clock < self.boot_row().token_expires_at

    def receive(self, passphrases: Mapping[str, Secret]) -> None:
        """Nothing was rekeyed, so a volume has the same passphrase for ever."""
        for volume, passphrase in passphrases.items():
            assert self.keys.setdefault(volume, passphrase) == passphrase

    def made(self) -> list[tuple[str, int, bytes | None]]:
        rows = self.rows(GenerationRow)
        return [(row.volume, row.generation, row.sealed) for row in rows if row.volume in VOLUMES]

    def rows(self, kind: type[R]) -> list[R]:
        return [row for row in self.world.rows(cast("Any", kind)) if isinstance(row, kind)]

    # --- what can happen ---

    @rule(seconds=st.sampled_from([1, 60, 300, 601]))
    def time_passes(self, seconds: int) -> None:
        self.network.wait(seconds)

    @when(State.STOPPED)
    @rule()
    def boot_anew(self) -> None:
        self.exchange = Exchange()

    @when(State.START)
    @rule(mishap=MISHAPS)
    def ask_for_a_nonce(self, mishap: str) -> None:
        self.asked_at = self.network.wall_clock
        self.nonce = self.step(fetch_nonce(SETTINGS), Input.NONCE, mishap) or b""

    @when(State.NONCE_HELD)
    @rule(mishap=st.sampled_from(["none", "none", "no quote", *FAULTS]))
    def make_a_quote(self, mishap: str) -> None:
        self.quoted = self.step(make_quote(SETTINGS, self.nonce), Input.QUOTE, mishap) or b""
        self.is_faulty = mishap in FAULTS

    @when(State.QUOTED)
    @rule(mishap=MISHAPS)
    def attest(self, mishap: str) -> None:
        fresh = self.network.wall_clock <= self.asked_at + 600
        grant = self.step(attest_boot(SETTINGS, self.nonce, self.quoted), Input.GRANT, mishap)
        if mishap in HARMLESS and mishap != Fate.DOUBLED.value:
            assert (grant is not None) == (fresh and not self.is_faulty)
        if grant is not None:
            self.grant, self.taken = grant, None
        if self.exchange.state is State.START and mishap == Fate.ANSWER_LOST.value:
            # why a new attempt has a new nonce: this one is consumed, or never was any good
            assert self.refused(attest_boot(SETTINGS, self.nonce, self.quoted))[0] in (401, 403)

    @when(State.TOKEN_HELD, State.SYNCED)
    @rule(mishap=MISHAPS)
    def sync(self, mishap: str) -> None:
        before, lives = self.made(), self.token_lives()
        keys = self.step(sync_volumes(self.held(), BLANK, retry=ONCE), Input.KEYS, mishap)
        if mishap in HARMLESS:
            assert (keys is not None) == lives
        assert not before or self.made() == before  # no volume's key is made twice, whatever was lost
        if keys is not None:
            self.receive({key.volume: key.passphrase for key in keys})

    @precondition(lambda machine: machine.exchange.state in (State.TOKEN_HELD, State.SYNCED) and machine.made())
    @rule(mishap=MISHAPS)
    def read_the_first_volume(self, mishap: str) -> None:
        lives = self.token_lives() and self.taken is None
        passphrase = self.step(read_cache_passphrase(self.held(), retry=ONCE), Input.PASSPHRASE, mishap)
        if mishap in HARMLESS:
            assert (passphrase is not None) == lives
        if passphrase is not None:
            self.receive({VOLUMES[0]: passphrase})

    @precondition(lambda machine: machine.exchange.state is State.TOKEN_HELD and not machine.made())
    @rule()
    def there_is_nothing_to_read_before_the_first_sync(self) -> None:
        assert self.refused(read_cache_passphrase(self.held(), retry=ONCE)) in (NO_KEY, TOKEN_GONE)

    @when(State.SYNCED)
    @rule()
    def a_spent_token_opens_nothing_else(self) -> None:
        assert self.refused(sync_volumes(self.held(), dict.fromkeys(VOLUMES[:1], False), retry=ONCE)) == TOKEN_GONE

    # --- what each state claims of the server's rows ---

    @invariant()
    def a_nonce_is_spent_only_by_its_grant(self) -> None:
        if self.exchange.state in (State.NONCE_HELD, State.QUOTED):
            assert self.nonce not in {row.value for row in self.rows(NonceRow)}

    @invariant()
    def a_token_is_spent_only_by_a_sync(self) -> None:
        if self.exchange.state in (State.TOKEN_HELD, State.SYNCED):
            row = self.boot_row()
            assert row.body_digest == self.taken
            assert (row.spent_at is None) == (self.taken is None)
        if self.exchange.state is State.SYNCED:
            assert self.taken is not None

    @invariant()
    def every_key_that_was_given_is_still_active(self) -> None:
        active = {row.volume for row in self.rows(GenerationRow) if row.state == "active"}
        assert {*self.keys} <= active


TestBoots = Boots.TestCase
TestBoots.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
