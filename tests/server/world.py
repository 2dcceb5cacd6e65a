"""A key server in a test's hand: the real app, store, verifier and platform; clock and random source are the test's."""

import hashlib
from collections.abc import Callable
from itertools import count
from typing import Any

from attrs import define, evolve, field
from cryptography.x509 import load_pem_x509_certificate

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.signing import SigningPolicy, messages_to_sign
from chutes_proto.effects import (
    Effect,
    Entropy,
    FetchCollateral,
    FetchGpuCollateral,
    Log,
    Now,
    Resolve,
    Sleep,
    Transact,
    Uptime,
    run,
)
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.gpu import GpuCollateral
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.log import Record
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._nonces import NonceMint
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._service import Service
from chutes_proto.store._rows import Row, Scan
from chutes_proto.store._run import Script, Unit
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.endpoint import Coverage
from chutes_proto.wire.http import HttpRequest, HttpResponse
from chutes_proto.wire.miners import NodeArgs
from tests.store.memory import MemoryStore

NOW = 1_800_000_000
CERTIFICATES = [load_pem_x509_certificate(make_client_identity(NOW, bytes([n]) * 32).certificate_pem) for n in range(2)]
MINER = HotkeyPair.from_secret(Secret(b"a miner's seed for tests, thirty".ljust(32, b"!")))
OTHER = HotkeyPair.from_secret(Secret(bytes(range(32))))
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
GPU = NodeArgs(
    uuid="GPU-1",
    name="NVIDIA H200",
    memory=150_000_000_000,
    clock_rate=1_980_000.0,
    device_index=0,
    gpu_identifier="h200",
    verification_host="1.2.3.4",
    verification_port=30443,
)
PLATFORM = SimulatedPlatform(b"a world for tests" * 2)


@define(eq=False)
class ScanAll(Unit[tuple[Row, ...]]):
    kind: type[Row]

    def script(self) -> Script[tuple[Row, ...]]:
        return (yield from Scan(self.kind))


def service(**changes: Any) -> Service:
    vault = Vault(KeyEncryptionKey.from_bytes(b"k" * 32))
    values: dict[str, Any] = {
        "vault": vault,
        "mint": NonceMint.of(vault),
        "root": TrustedRoot.from_der(PLATFORM.root_der),
        "trust": "simulated",
        "profiles": {PROFILE.identity: ServedProfile(PROFILE, None, False, False)},
        "hotkeys": "*",
        "rotate_after": 0,
    }
    return Service(**(values | changes))


@define(eq=False)
class World:
    app: App = field(factory=lambda: App(service()))
    store: Any = field(factory=MemoryStore)
    platform: SimulatedPlatform = PLATFORM
    now: int = NOW
    uptime: float = 1000.0
    log: list[Record] = field(factory=list)
    asked: list[Effect[Any]] = field(factory=list)
    before: Callable[[Effect[Any]], None] = lambda _: None
    certificate: Any = CERTIFICATES[0]
    names: dict[str, tuple[str, ...]] = field(factory=dict)
    gpus: GpuCollateral | None = None
    _number: int = field(factory=count().__next__)
    _drawn: int = 0

    def perform(self, effect: Effect[Any]) -> Any:
        self.asked.append(effect)
        self.before(effect)
        match effect:
            case Now():
                return self.now
            case Uptime():
                return self.uptime
            case Entropy(size):
                self._drawn += 1
                return hashlib.shake_256(b"%d %d" % (self._number, self._drawn)).digest(size)
            case Sleep(seconds):
                self.uptime += seconds
            case Log(record):
                self.log.append(record)
            case Transact(unit):
                return self.store.transact(unit)
            case FetchGpuCollateral():
                if self.gpus is None:
                    raise CollateralUnavailable("the directory is gone")
                return self.gpus
            case Resolve(name):
                return self.names.get(name, ())
            case FetchCollateral(identity, now):
                if identity.fmspc != self.platform.fmspc:
                    raise CollateralUnavailable("of another platform")
                collateral = Collateral.from_json(self.platform.collateral_json(self.now))
                return verify_collateral(collateral, now=now, root=self.app.service.root)
            case _:
                raise AssertionError(effect)
        return None

    def ask(
        self, method: str, target: str, body: Any = None, *, headers: dict[str, str] | None = None, **changes: Any
    ) -> HttpResponse:
        """Send one request; ``body`` is encoded unless it is bytes already."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.encode(body)
        fields = {"host": "keys.example", **(headers or {})}
        request = HttpRequest(
            method, target, tuple(fields.items()), content, self.certificate, "192.0.2.1", arrived=self.uptime
        )
        return run(self.app.handle(evolve(request, **changes)), self.perform)

    def nonce(self, query: str = "") -> str:
        return str(answer(self.ask("GET", "/servers/nonce" + query))["nonce"])

    def attestation(self, nonce: str | None = None, **members: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Body and headers of a good attestation by this world's platform and certificate, but for ``members``."""
        nonce = nonce or self.nonce()
        quote = self.platform.quote(report_data(bytes.fromhex(nonce), spki_sha256(self.certificate)))
        body = {"quote": encode_quote(quote), "miner_hotkey": HOTKEY, "vm_name": "vm-1"}
        return body | members, {"x-chutes-nonce": nonce, "content-type": "application/json"}

    def boot(self, nonce: str | None = None, **members: Any) -> HttpResponse:
        body, headers = self.attestation(nonce, **members)
        return self.ask("POST", "/servers/boot/attestation", body, headers=headers)

    def token(self, **members: Any) -> str:
        return str(answer(self.boot(**members))["boot_token"])

    def sync(self, token: str, body: Any, *, hotkey: str = HOTKEY, vm: str = "vm-1") -> HttpResponse:
        headers = {"x-boot-token": token, "x-chutes-hotkey": hotkey, "content-type": "application/json"}
        return self.ask("POST", f"/servers/{vm}/luks", body, headers=headers)

    def ask_signed(
        self,
        method: str,
        target: str,
        body: Any = None,
        *,
        pair: HotkeyPair = MINER,
        nonce: str | None = None,
        coverage: Coverage | None = None,
        policy: SigningPolicy = "compatible",
        purpose: str = "tee",
        **changes: Any,
    ) -> HttpResponse:
        """Send a request signed by ``pair``, as operations of a miner are: POST over the body, others by purpose."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.encode(body)
        nonce = nonce or str(self.now)
        covered = coverage or ("body" if method == "POST" else "purpose")
        message, *_ = messages_to_sign(covered, policy, pair.hotkey, nonce, method, target, content, purpose)
        headers = {
            "content-type": "application/json",
            "x-chutes-hotkey": pair.hotkey.address,
            "x-chutes-nonce": nonce,
            "x-chutes-signature": pair.sign(message).hex(),
        }
        return self.ask(method, target, content, headers=headers, **changes)

    def rows(self, kind: type[Row]) -> Any:
        return self.store.transact(ScanAll(kind))


def answer(response: HttpResponse) -> Any:
    """The members of a 200, which must be compact JSON."""
    assert response.status == 200, response.body
    return content(response)


def refusal(response: HttpResponse) -> tuple[int, str, Any]:
    """Status, code and detail of an error, which must have the documented shape."""
    assert response.status >= 400
    members = content(response)
    assert list(members) == ["detail", "code", "request_id"]
    return response.status, members["code"], members["detail"]


def content(response: HttpResponse) -> Any:
    assert response.header("content-type") == "application/json"
    members = json.decode(response.body)
    assert json.encode(members) == response.body
    return members
