"""The steps of `chutes-proto demo`: everything but the platform is real, and every expectation is checked."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import httpx
import trio
from attrs import evolve, frozen

from chutes_proto._error import ChutesError
from chutes_proto.auth.client_identity import ENTROPY_SIZE, ClientIdentity, make_client_identity
from chutes_proto.auth.hotkey import HotkeyPair, check_installed
from chutes_proto.boot._flows import BootSettings, attest_boot, boot, fetch_nonce, make_quote, sync_volumes
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Flow
from chutes_proto.errors import LocalProtocolError, Refusal
from chutes_proto.io.clients.aio import BootAgent, MinerClient
from chutes_proto.io.disks.cryptsetup import HOW_TO_INSTALL, Disks, find_cryptsetup
from chutes_proto.io.drivers.aio import HttpxSender, Performer
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.quoters.choose import GpuTool, Quoter
from chutes_proto.io.server.development import AUTHORITY, CONFIGURATION, write_collateral, write_gpus, write_server
from chutes_proto.io.server.serving import serve, unwrapped
from chutes_proto.log import Record
from chutes_proto.luks.plan import Format, Key, Open
from chutes_proto.miner import Gpu, Miner, attest_server
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.testing._gpus import SimulatedGpus
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.codes import Code

HOTKEY: Final = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
VOLUMES: Final = ("storage", "tdx-cache")
SECONDS: Final = 60
"""How long the whole may take."""
_GPUS: Final = 8
_SERVER, _HOST = "server-1", "1.2.3.4"
_GPU: Final = Gpu(
    uuid="GPU-0",
    name="NVIDIA H200",
    memory=150_000_000_000,
    clock_rate=1_980_000.0,
    device_index=0,
    gpu_identifier="h200",
    verification_host=_HOST,
    verification_port=30443,
)
_IMAGE_SIZE: Final = 20 * 1024 * 1024  # a LUKS2 header takes 16 MiB


class Page(Protocol):
    """Shows each step as it ends, and counts checks."""

    passed: int
    failed: int

    @property
    def seconds(self) -> float: ...
    def title(self, text: str, explanation: str) -> None: ...
    def section(self, title: str) -> None: ...
    def step(self, name: str, text: str, *, passed: bool = True) -> None: ...
    def table(self, heads: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> None: ...
    def note(self, text: str) -> None: ...
    def summary(self, text: str, *, passed: bool) -> None: ...


@frozen
class Attack:
    """An attempt that must be refused: how the VM goes about it, with which quoter, and the answer it must get."""

    what: str
    go_about: Callable[[BootSettings], Flow[object]]
    quoter: Quoter
    code: Code
    reason: str
    gpu_tool: GpuTool | None = None


@frozen
class Received:
    """Keys that one boot received, and the public key that it used."""

    spki_sha256: bytes
    nonce: bytes
    passphrases: Mapping[str, Secret]


async def show(directory: Path, page: Page) -> bool:
    """Run everything, with its files in ``directory``; return whether all went as it should."""
    page.title(
        "A confidential VM gets its disk keys from a key server",
        "Everything runs now, on this machine; only the TDX platform and the GPUs are simulated.",
    )
    story = _Story(directory, page)
    complaint = ""
    with trio.move_on_after(SECONDS) as limit:
        try:
            with unwrapped():
                await story.run()
        except ChutesError as exc:
            complaint = str(exc)
    if limit.cancelled_caught:
        complaint = f"not done after {SECONDS} s"
    if complaint:
        page.step("stopped", complaint, passed=False)
    if page.failed:
        page.summary(f"{page.failed} of {page.failed + page.passed} checks FAILED.", passed=False)
        return False
    page.summary(
        f"All {page.passed} checks passed in {page.seconds:.1f} s:"
        f" {story.granted} boots granted, {story.refused} attacks refused.",
        passed=True,
    )
    page.note("Next, a server of your own: chutes-proto serve --dev")
    return True


class _Story:
    def __init__(self, directory: Path, page: Page) -> None:
        self._directory = directory
        self._page = page
        self._platform = SimulatedPlatform(os.urandom(32))
        self._gpus = SimulatedGpus(os.urandom(32), count=_GPUS)
        self._url = ""
        self._log: list[Record] = []
        self.granted: int = 0
        self.refused: int = 0

    async def run(self) -> None:
        """The key server, and all that happens to it."""
        self._page.section("A key server starts")
        now = int(time.time())
        write_server(self._directory, self._platform, now)
        write_gpus(self._directory, self._gpus, now, demand="require")
        revoked = self._platform.another(1)
        write_collateral(self._directory / "collateral", revoked.having("pck_revoked"), now)
        self._page.step("platform", "simulated; only this server trusts its root")
        async with trio.open_nursery() as nursery:
            (self._url,) = await nursery.start(self._serve)
            self._page.step("server", f"{self._url}, mutual TLS, rows in SQLite")
            received = await self._boots()
            miner = await self._register()
            self._page.section("Attacks are refused")
            rows = [await self._attack(attack) for attack in self._attacks(revoked, miner)]
            self._page.table(("Attack", "Check that failed", "Answer"), rows)
            nursery.cancel_scope.cancel()
        self._page.section("Secrets stay secret")
        self._look_for_secrets(received.passphrases.values())

    async def _serve(self, task_status: trio.TaskStatus[Sequence[str]]) -> None:
        config = ServerConfig.load(self._directory / CONFIGURATION)
        await serve(config, ready=task_status.started, log=self._log.append)

    # --- what is granted ---

    async def _boots(self) -> Received:
        program = find_cryptsetup()
        disks = Disks(program, images=True)
        self._page.section("A VM boots")
        first = await self._boot(formatted=())
        for name, passphrase in first.passphrases.items():
            text = f"passphrase {_fingerprint(passphrase.reveal())} received"
            if program is not None and name in VOLUMES:
                action = Format(name, self._make_image(name), Key.CURRENT)
                _ = await trio.to_thread.run_sync(disks.act, action, {Key.CURRENT: passphrase})
                text += ", disk formatted"
            self._page.step(name, text)
        self._page.section("It reboots and gets the same keys")
        again = await self._boot(formatted=() if program is None else VOLUMES)
        rows = [
            _compared("TLS key", first.spki_sha256, again.spki_sha256, "new at each boot", same=False),
            _compared("nonce", first.nonce, again.nonce, "new at each boot", same=False),
        ]
        for name, passphrase in again.passphrases.items():
            found = ""
            if program is not None and name in VOLUMES:
                opening = Open(name, self._image(name), name, (Key.CURRENT,))
                _ = await trio.to_thread.run_sync(disks.act, opening, {Key.CURRENT: passphrase})
                found = "opens the LUKS2 disk"
            rows.append(_compared(name, first.passphrases[name].reveal(), passphrase.reveal(), found, same=True))
        self._page.table(("", "First boot", "", "Reboot", ""), rows)
        self._page.note("Keys are shown as the beginning of their SHA-256, never themselves.")
        if program is None:
            self._page.note(f"cryptsetup is not installed, so there are no disks. To see them: {HOW_TO_INSTALL}")
        return again

    async def _boot(self, formatted: tuple[str, ...]) -> Received:
        """One boot of the VM by the boot agent."""
        identity = _identity()
        self._page.step("TLS key", f"{_fingerprint(identity.spki_sha256)} made for this boot")
        made: list[tuple[bytes, bytes]] = []

        def quoter(report_data: bytes) -> bytes:
            quote = self._platform.quote(report_data)
            made.append((report_data, quote))  # shown later: the agent would try again where a reader is gone
            return quote

        async with BootAgent(
            self._url,
            hotkey=HOTKEY,
            vm_name="vm-1",
            quoter=quoter,
            ca_pem=(self._directory / AUTHORITY).read_bytes(),
            identity=identity,
            log=lambda _: None,
        ) as agent:
            grant = await agent.boot()
            report_data, quote = made[-1]
            self._page.step("quote", f"{len(quote):,} bytes; binds the server's nonce and the TLS key")
            granted = next(r for r in reversed(self._log) if r.event == "boot_granted").fields
            self._page.step(
                "granted", f"TCB {granted['tcb_status']}, measurements match profile {granted['profile']!r}"
            )
            self.granted += 1
            keys = await agent.sync({volume: volume in formatted for volume in VOLUMES})
        passphrases = {"root": grant.root_passphrase, **{key.volume: key.passphrase for key in keys}}
        return Received(identity.spki_sha256, report_data[:32], passphrases)

    async def _register(self) -> Miner | None:
        """A miner registers the machine with its GPUs, and proves both; None where hotkeys cannot sign."""
        try:
            check_installed()
        except LocalProtocolError as exc:
            self._page.note(f"No machine is registered: {exc}")
            return None
        self._page.section("Its owner registers it, with its GPUs")
        pair = HotkeyPair.from_secret(Secret(os.urandom(32)))
        made: list[bytes] = []

        def gpu_tool(nonce: bytes) -> bytes:
            made.append(self._gpus.evidence_json(nonce))
            return made[-1]

        async with MinerClient(
            self._url,
            hotkey=pair.hotkey.address,
            signer=pair.sign,
            quoter=partial(self._platform.quote, stage="runtime"),
            gpu_tool=gpu_tool,
            ca_pem=(self._directory / AUTHORITY).read_bytes(),
            log=lambda _: None,
        ) as client:
            await client.register(_SERVER, host=_HOST, gpus=[evolve(_GPU, uuid=f"GPU-{n}") for n in range(_GPUS)])
            self._page.step("registered", f"{_SERVER}, {_GPUS} {_GPU.name}")
            _ = await client.attest(_SERVER)
        self._page.step("GPUs", f"{len(made[-1]):,} bytes; {_GPUS} reports, signed over the server's nonce")
        attested = next(r for r in reversed(self._log) if r.event == "server_attested").fields
        verified = str(attested["gpus"])
        text = re.sub(r"^GPU evidence |, serial numbers.*| [0-9a-f]{16}\b", "", verified)
        self._page.step("attested", text, passed=verified.startswith(f"GPU evidence verified: {_GPUS} devices"))
        return Miner(pair.hotkey.address, pair.sign, retry=RetryPolicy(attempts=1))

    def _image(self, volume: str) -> str:
        return str(self._directory / f"{volume}.img")

    def _make_image(self, volume: str) -> str:
        """A blank disk in a file; it takes no room that nothing is written to."""
        path = self._image(volume)
        with Path(path).open("wb") as file:
            _ = file.truncate(_IMAGE_SIZE)
        return path

    def _look_for_secrets(self, secrets: Iterable[Secret]) -> None:
        """Look for each passphrase in the clear, in the server's log and in its store."""
        logged = "\n".join(record.as_json("") for record in self._log).encode()
        stored = b"".join(path.read_bytes() for path in self._directory.glob("keys.db*"))
        places = {"log": (logged, f"{len(self._log)} lines"), "store": (stored, f"{len(stored):,} bytes")}
        for place, (content, size) in places.items():
            found = sum(secret.reveal() in content for secret in secrets)
            self._page.step(place, f"{size}; passphrases in the clear: {found}", passed=not found)

    # --- what is refused ---

    def _attacks(self, revoked: SimulatedPlatform, miner: Miner | None) -> tuple[Attack, ...]:
        honest, having = self._platform.quote, self._platform.having
        attacks = (
            Attack("replayed nonce", _replay_nonce, honest, Code.NONCE_INVALID, "redeemed"),
            Attack("another TLS key", _quote_other_key, honest, Code.CERTIFICATE_MISMATCH, "TLS key"),
            Attack("altered kernel", boot, having("rtmr1").quote, Code.MEASUREMENT_MISMATCH, "RTMR1"),
            Attack("debug TD", boot, having("debug").quote, Code.ATTRIBUTES_REJECTED, "debug"),
            Attack("revoked platform", boot, revoked.quote, Code.QUOTE_REJECTED, "pck_revoked"),
            Attack("reused boot token", _reuse_token, honest, Code.BOOT_TOKEN_INVALID, "another body"),
        )
        if miner is None:
            return attacks
        attest = partial(_attest, miner)
        runtime = partial(self._platform.quote, stage="runtime")
        firmware, old = self._gpus.having("measurement"), self._gpus.having("nonce_other")
        code = Code.GPU_EVIDENCE_REJECTED
        return (
            *attacks,
            Attack("altered GPU firmware", attest, runtime, code, "measurement_mismatch", firmware.evidence_json),
            Attack("old GPU evidence", attest, runtime, code, "nonce_mismatch", old.evidence_json),
        )

    async def _attack(self, attack: Attack) -> tuple[bool, tuple[str, ...]]:
        """Try it: whether it was refused as it must be, and the cells of its row."""
        identity = _identity()
        settings = BootSettings(HOTKEY, "vm-2", identity.spki_sha256, retry=RetryPolicy(attempts=1))
        context = client_context(identity, (self._directory / AUTHORITY).read_bytes())
        expected = f"{attack.code.status} {attack.code}"
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            performer = Performer(
                send=HttpxSender(client, self._url), quoter=attack.quoter, gpu_tool=attack.gpu_tool, log=lambda _: None
            )
            try:
                _ = await performer.run(attack.go_about(settings))
            except Refusal as exc:
                refusal = exc
            else:
                return False, (attack.what, f"none; expected {expected}", "NOT refused")
        self.refused += 1
        logged = (r for r in self._log if r.event == "refused" and r.fields["request_id"] == refusal.request_id)
        record = next(logged, None)
        reason = "" if record is None else str(record.fields["reason"])
        answer = f"{refusal.status} {refusal.code}"
        check = re.sub(r" [(\[].*", "", reason.removeprefix(f"{refusal.code}: "))  # values and steps are for a log
        passed = answer == expected and attack.reason in reason
        if not passed:
            check += f" (expected {expected} and {attack.reason!r})"
        return passed, (attack.what, check, answer)


def _fingerprint(value: bytes) -> str:
    """A few digits of a hash, to compare values that must not be shown."""
    return hashlib.sha256(value).hexdigest()[:8] + "…"


def _compared(name: str, first: bytes, again: bytes, remark: str, *, same: bool) -> tuple[bool, tuple[str, ...]]:
    """A row that shows whether two values are the same, as they should be or should not."""
    relation = "=" if first == again else "≠"
    return (first == again) is same, (name, _fingerprint(first), relation, _fingerprint(again), remark)


def _identity() -> ClientIdentity:
    return make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))


# --- what a VM does that must be refused ---


def _replay_nonce(settings: BootSettings) -> Flow[object]:
    nonce = yield from fetch_nonce(settings)
    quote = yield from make_quote(settings, nonce)
    _ = yield from attest_boot(settings, nonce, quote)
    return (yield from attest_boot(settings, nonce, quote))


def _quote_other_key(settings: BootSettings) -> Flow[object]:
    nonce = yield from fetch_nonce(settings)
    quote = yield from make_quote(evolve(settings, spki_sha256=_identity().spki_sha256), nonce)
    return (yield from attest_boot(settings, nonce, quote))


def _reuse_token(settings: BootSettings) -> Flow[object]:
    grant = yield from boot(settings)
    _ = yield from sync_volumes(grant, dict.fromkeys(VOLUMES, False))
    return (yield from sync_volumes(grant, dict.fromkeys(VOLUMES[:1], False)))


def _attest(miner: Miner, settings: BootSettings) -> Flow[object]:
    return (yield from attest_server(miner, _SERVER, settings.spki_sha256, with_gpus=True))
