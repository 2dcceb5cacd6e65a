"""What `demo` shows, step by step: everything is real but the platform, and every expectation is checked."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import httpx
import trio
from attrs import frozen

from chutes_proto._error import ChutesError
from chutes_proto.auth.client_identity import ENTROPY_SIZE, ClientIdentity, make_client_identity
from chutes_proto.boot._flows import BootSettings, attest_boot, boot, fetch_nonce, make_quote, sync_volumes
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.cli import console
from chutes_proto.cli.operator.development import AUTHORITY, CONFIGURATION, write_collateral, write_server
from chutes_proto.effects import Flow
from chutes_proto.errors import Refusal
from chutes_proto.io.clients.boot_aio import BootAgent
from chutes_proto.io.disks.cryptsetup import HOW_TO_INSTALL, Disks, find_cryptsetup
from chutes_proto.io.drivers.aio import HttpxSender, Performer
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.quoters.choose import Quoter
from chutes_proto.io.server.serving import serve, unwrapped
from chutes_proto.log import Record
from chutes_proto.luks.plan import Format, Key, Open
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.codes import Code

HOTKEY: Final = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
VOLUMES: Final = ("storage", "tdx-cache")
SECONDS: Final = 60
"""How long the whole may take."""
_IMAGE_SIZE: Final = 20 * 1024 * 1024  # a LUKS2 header takes 16 MiB


class UnexpectedError(Exception):
    """Something did not go as it should; the text says what."""


class Steps:
    """Prints each step with its time, and counts."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.taken: int = 0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def say(self, text: str, *, done: bool = True) -> None:
        """One line. Long hexadecimal values are cut, because they are for a log."""
        self.taken += done
        short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1..", text)
        console.say(f"{self.seconds:6.2f} s  {'ok    ' if done else 'FAILED'}  {short}")


@frozen
class Rebuff:
    """What must be refused: how the VM goes about it, with which quoter, and the answer it must get."""

    what: str
    go_about: Callable[[BootSettings], Flow[object]]
    quoter: Quoter
    code: Code
    reason: str


async def show(directory: Path) -> bool:
    """Everything, with its files in ``directory``; whether all went as it should."""
    steps = Steps()
    complaint = ""
    with trio.move_on_after(SECONDS) as limit:
        try:
            with unwrapped():
                await _Show(directory, steps).run()
        except (UnexpectedError, ChutesError) as exc:
            complaint = str(exc)
    if limit.cancelled_caught:
        complaint = f"not done after {SECONDS} s"
    if complaint:
        steps.say(complaint, done=False)
        console.say(f"After {steps.taken} steps, one did NOT go as it should.")
        return False
    console.say(
        f"All {steps.taken} steps went as they should, in {steps.seconds:.1f} s: two boots granted, six others refused."
    )
    return True


class _Show:
    def __init__(self, directory: Path, steps: Steps) -> None:
        self._directory = directory
        self._step = steps.say
        self._platform = SimulatedPlatform(os.urandom(32))
        self._url = ""
        self._log: list[Record] = []
        self._secrets: tuple[Secret, ...] = ()

    async def run(self) -> None:
        """The key server, and all that happens to it."""
        now = int(time.time())
        write_server(self._directory, self._platform, now)
        revoked = self._platform.another(1)
        write_collateral(self._directory / "collateral", revoked.having("pck_revoked"), now)
        self._step("platform: a simulated one, whose root is not Intel's and is trusted by this server only")
        async with trio.open_nursery() as nursery:
            (self._url,) = await nursery.start(self._serve)
            store = next(record.fields["store"] for record in self._log if record.event == "serving")
            self._step(f"server: {self._url}, mutual TLS, on trio, store in SQLite at {store}")
            await self._boots()
            for rebuff in self._rebuffs(revoked):
                await self._refused(rebuff)
            nursery.cancel_scope.cancel()
        self._look_for_secrets()

    async def _serve(self, task_status: trio.TaskStatus[Sequence[str]]) -> None:
        config = ServerConfig.load(self._directory / CONFIGURATION)
        await serve(config, ready=task_status.started, log=self._log.append)

    # --- what is granted ---

    async def _boots(self) -> None:
        program = find_cryptsetup()
        disks = Disks(program, images=True, mapping=False)
        received = await self._boot("boot", formatted=())
        if program is None:
            self._step(f"disks: cryptsetup is not installed, so there are none; get it with: {HOW_TO_INSTALL}")
        else:
            for volume in VOLUMES:
                action = Format(volume, self._make_image(volume), Key.CURRENT)
                _ = await trio.to_thread.run_sync(disks.act, action, {Key.CURRENT: received[volume]})
                self._step(f"disks: {volume} formatted as LUKS2 with its passphrase")
        again = await self._boot("reboot", formatted=() if program is None else VOLUMES)
        for name, passphrase in again.items():
            if passphrase != received[name]:
                raise UnexpectedError(f"the passphrase of {name} is another one after the reboot")
        if program is None:
            self._step("reboot: a new client key, the same passphrases")
        else:
            for volume in VOLUMES:
                opening = Open(volume, self._image(volume), volume, (Key.CURRENT,))
                _ = await trio.to_thread.run_sync(disks.act, opening, {Key.CURRENT: again[volume]})
                self._step(f"reboot: the passphrase received now opens {volume}")
        self._secrets = tuple(received.values())

    async def _boot(self, title: str, formatted: tuple[str, ...]) -> Mapping[str, Secret]:
        """One boot of the VM by the boot agent: the passphrases, the root's under ``root``."""
        identity = _identity()
        self._step(f"{title}: a throw-away client key, SHA-256 {identity.spki_sha256.hex()}")

        def quoter(report_data: bytes) -> bytes:
            self._step(f"{title}: a nonce, ..{report_data[26:32].hex()}")
            quote = self._platform.quote(report_data)
            self._step(f"{title}: a TDX quote of {len(quote)} bytes that binds the nonce and the client key")
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
            granted = next(r for r in reversed(self._log) if r.event == "boot_granted").fields
            self._step(
                f"{title}: granted; TCB {granted['tcb_status']}, measurements {granted['profile']!r}: "
                f"root passphrase ({len(grant.root_passphrase)} characters) and boot token received"
            )
            keys = await agent.sync({volume: volume in formatted for volume in VOLUMES})
            lengths = ", ".join(f"{key.volume} ({len(key.passphrase)} characters)" for key in keys)
            in_use = ", ".join(key.volume for key in keys if key.is_in_use) or "none"
            self._step(f"{title}: synced; passphrases of {lengths}; in use: {in_use}")
        return {"root": grant.root_passphrase, **{key.volume: key.passphrase for key in keys}}

    def _image(self, volume: str) -> str:
        return str(self._directory / f"{volume}.img")

    def _make_image(self, volume: str) -> str:
        """A blank disk in a file; it takes no room that nothing is written to."""
        path = self._image(volume)
        with Path(path).open("wb") as file:
            _ = file.truncate(_IMAGE_SIZE)
        return path

    def _look_for_secrets(self) -> None:
        """No passphrase may stand in the clear where one is not meant to be."""
        logged = "\n".join(record.as_json("") for record in self._log).encode()
        stored = b"".join(path.read_bytes() for path in self._directory.glob("keys.db*"))
        if any(secret.reveal() in logged + stored for secret in self._secrets):
            raise UnexpectedError("a passphrase stands in the clear in the server's log or store")
        self._step(f"secrets: no passphrase in {len(self._log)} lines of log or in {len(stored)} bytes of store")

    # --- what is refused ---

    def _rebuffs(self, revoked: SimulatedPlatform) -> tuple[Rebuff, ...]:
        honest, having = self._platform.quote, self._platform.having
        return (
            Rebuff("a replayed nonce", _replay_nonce, honest, Code.NONCE_INVALID, "redeemed"),
            Rebuff("a quote for another TLS key", _quote_other_key, honest, Code.CERTIFICATE_MISMATCH, "TLS key"),
            Rebuff("a wrong measurement", boot, having("rtmr1").quote, Code.MEASUREMENT_MISMATCH, "RTMR1"),
            Rebuff("a debug TD", boot, having("debug").quote, Code.ATTRIBUTES_REJECTED, "debug"),
            Rebuff("a revoked PCK certificate", boot, revoked.quote, Code.QUOTE_REJECTED, "pck_revoked"),
            Rebuff("a spent boot token with another body", _reuse_token, honest, Code.BOOT_TOKEN_INVALID, "spent"),
        )

    async def _refused(self, rebuff: Rebuff) -> None:
        identity = _identity()
        settings = BootSettings(HOTKEY, "vm-2", identity.spki_sha256, retry=RetryPolicy(attempts=1))
        context = client_context(identity, (self._directory / AUTHORITY).read_bytes())
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            performer = Performer(send=HttpxSender(client, self._url), quoter=rebuff.quoter, log=lambda _: None)
            try:
                _ = await performer.run(rebuff.go_about(settings))
            except Refusal as exc:
                refusal = exc
            else:
                raise UnexpectedError(f"{rebuff.what} was NOT refused")
        record = next(
            (r for r in self._log if r.event == "refused" and r.fields["request_id"] == refusal.request_id), None
        )
        operator = f"operator reads: {'nothing' if record is None else record.fields['reason']}"
        text = f"refused: {rebuff.what}: {refusal.status} {refusal.code}; {operator}"
        if (refusal.code, refusal.status) != (rebuff.code, rebuff.code.status) or rebuff.reason not in operator:
            raise UnexpectedError(f"{text} (expected {rebuff.code.status} {rebuff.code} and {rebuff.reason!r})")
        self._step(text)


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
    quote = yield from make_quote(attrs.evolve(settings, spki_sha256=_identity().spki_sha256), nonce)
    return (yield from attest_boot(settings, nonce, quote))


def _reuse_token(settings: BootSettings) -> Flow[object]:
    grant = yield from boot(settings)
    _ = yield from sync_volumes(grant, dict.fromkeys(VOLUMES, False))
    return (yield from sync_volumes(grant, dict.fromkeys(VOLUMES[:1], False)))
