"""The client's part of the provisioned exchange: what it proves and asks for, and what it makes of answers."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.boot._disks import unlock_root
from chutes_proto.boot._flows import BootGrant, BootSettings, attest_boot, attest_volumes, confirm_root, confirm_volumes
from chutes_proto.boot._session import BootSession
from chutes_proto.effects import ActOnDisk, InspectDisk, MakeQuote, Send
from chutes_proto.errors import DiskError, LocalProtocolError, RemoteProtocolError, TransportError
from chutes_proto.luks.disk import judge
from chutes_proto.luks.plan import AddKey, KeepKey, Key, Open, RemoveMark
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Playbook
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.boot import talk
from tests.boot.test_rotation import NONCE, VOLUMES, confirmed, handed
from tests.luks import headers

PAIR = HotkeyPair.from_secret(Secret(bytes(range(32))))
SETTINGS = BootSettings(PAIR.hotkey.address, talk.VM, talk.DIGEST, PAIR.sign, talk.SETTINGS.retry)
CONFIRM = "c2" * 32
MEMBERS: dict[str, object] = {
    "boot_token": None,
    "luks_quote_nonce": NONCE,
    "root_next": "next",
    "root_confirm_nonce": CONFIRM,
    "vm_auth_ss58": talk.HOTKEY,
}
DEVICE = "/dev/vda3"
ROOT = Volume("root", DEVICE, "cryptroot")
MARK = {"15": {"type": "chutes-first-boot", "keyslots": []}}
MARKED = headers.both({**headers.told(), "tokens": MARK})
DISK, FRESH = (judge(data, [], headers.SIZE, DEVICE) for data in (headers.both(headers.told()), MARKED))


def granted(settings: BootSettings = SETTINGS, **members: object) -> BootGrant:
    script = ((Send, talk.grant_answer(**{**MEMBERS, **members})),)
    return Playbook(*script, aside=talk.calm()).run(attest_boot(settings, talk.NONCE, talk.QUOTE))


def proven(effect: Any, path: str, nonce: str) -> bool:
    """A request to this path whose proof holds."""
    if not isinstance(effect, Send) or effect.request.target != path:
        return False
    request: HttpRequest = effect.request
    (signature,) = request.header_values("x-chutes-signature")
    assert request.header_values("x-chutes-nonce") == (nonce,)
    assert request.header_values("x-chutes-hotkey") == (PAIR.hotkey.address,)
    message = f"{PAIR.hotkey.address}:{nonce}:{hashlib.sha256(request.body).hexdigest()}"
    PAIR.hotkey.check_signature(message.encode(), bytes.fromhex(signature))
    return True


def root_confirmed() -> HttpResponse:
    return talk.answer({"status": "confirmed", "volumes": {"root": {"result": "promoted"}}})


def test_each_step_proves_the_hotkey_over_its_own_nonce() -> None:
    bodies: list[bytes] = []

    def step(path: str, nonce: str) -> Any:
        def expected(effect: Any) -> bool:
            bodies.extend([effect.request.body] if isinstance(effect, Send) else [])
            return proven(effect, path, nonce)

        return expected

    path = f"/servers/{talk.VM}/provision"
    attestation = (step("/servers/boot/attestation", talk.NONCE.hex()), talk.grant_answer(**MEMBERS, key_second="s"))
    grant = Playbook(attestation, aside=talk.calm()).run(attest_boot(SETTINGS, talk.NONCE, talk.QUOTE))
    assert bodies[0].endswith(b',"second_key":true}')
    assert grant.is_provisioned
    assert grant.root
    assert (grant.root.next, grant.root.second) == (Secret(b"next"), Secret(b"s"))
    of_root = (step(f"{path}/confirm", CONFIRM), root_confirmed())
    assert Playbook(of_root, aside=talk.calm()).run(confirm_root(SETTINGS, grant)) == "promoted"
    assert bodies[1] == b'{"volumes":{"root":{"rotated":true}}}'
    script = ((MakeQuote, b"quote"), (step(path, NONCE), handed()))
    rotation = Playbook(*script, aside=talk.calm()).run(attest_volumes(SETTINGS, VOLUMES, grant=grant))
    of_volumes = (step(f"{path}/confirm", "c1" * 32), confirmed())
    assert Playbook(of_volumes, aside=talk.calm()).run(confirm_volumes(rotation))["storage"] == "promoted"
    assert CONFIRM not in repr((grant, rotation))


def test_a_fresh_image_is_told_of_with_a_proof_only() -> None:
    def body(settings: BootSettings) -> bytes:
        sent: list[bytes] = []

        def attestation(effect: Any) -> bool:
            sent.append(effect.request.body)
            return True

        script = ((attestation, talk.grant_answer()),)
        _ = Playbook(*script, aside=talk.calm()).run(attest_boot(settings, talk.NONCE, talk.QUOTE))
        return sent[0]

    assert b'"first_boot":true,"second_key":true' in body(evolve(SETTINGS, first_boot=True))
    assert b"first_boot" not in body(SETTINGS)
    assert b"first_boot" not in body(evolve(talk.SETTINGS, first_boot=True))
    assert b"second_key" not in body(talk.SETTINGS)


@pytest.mark.parametrize(
    "members",
    [
        *({name: None} for name in ("luks_quote_nonce", "root_next", "root_confirm_nonce", "vm_auth_ss58")),
        {"root_confirm_nonce": "c2"},
        {"vm_auth_ss58": "5"},
        {"root_next": ""},
        {"key_second": ""},
        {"boot_token": "11" * 32},
        {"boot_token": "11" * 32, "luks_quote_nonce": None},
    ],
    ids=str,
)
def test_a_grant_that_is_not_whole_is_none(members: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        _ = granted(SETTINGS, **members)


def test_without_a_signer_the_later_steps_are_not_taken() -> None:
    unsigned = evolve(SETTINGS, signer=None)
    grant = granted(unsigned)
    with pytest.raises(LocalProtocolError, match="needs a signer"):
        _ = Playbook(aside=talk.calm()).run(confirm_root(unsigned, grant))
    with pytest.raises(LocalProtocolError, match="needs a signer"):
        _ = Playbook((MakeQuote, b"quote"), aside=talk.calm()).run(attest_volumes(unsigned, VOLUMES, grant=grant))
    with pytest.raises(LocalProtocolError, match="does not rotate"):
        _ = Playbook(aside=talk.calm()).run(confirm_root(SETTINGS, talk.GRANT))


def test_the_root_key_is_confirmed_before_the_rotation_of_volumes() -> None:
    session = BootSession(SETTINGS, granted(SETTINGS))
    script = ((MakeQuote, b"quote"), (Send, handed()))
    _ = Playbook(*script, aside=talk.calm()).run(session.begin_rotation(VOLUMES))
    with pytest.raises(LocalProtocolError, match="once a rotation has begun: boot, confirm, rotate"):
        _ = Playbook(aside=talk.calm()).run(session.confirm_root())


KEYS = {Key.CURRENT: Secret(talk.ROOT.encode()), Key.NEXT: Secret(b"next"), Key.SECOND: Secret(b"s")}
LOST = [(Send, TransportError("lost", maybe_delivered=True))] * 3


def act(kind: type[Any], reply: object = None) -> tuple[Any, object]:
    """An action of this kind, with all three keys, each of which may open the disk."""

    def expected(effect: Any) -> bool:
        if not isinstance(effect, ActOnDisk) or not isinstance(effect.action, kind) or effect.keys != KEYS:
            return False
        return not isinstance(effect.action, Open) or effect.action.keys == tuple(KEYS)

    return expected, reply


@pytest.mark.parametrize(
    ("disk", "script"),
    [
        (DISK, [act(Open, Key.CURRENT), act(AddKey), (Send, root_confirmed()), act(KeepKey)]),
        (DISK, [act(Open, Key.NEXT), act(AddKey), (Send, root_confirmed()), act(KeepKey)]),
        (DISK, [act(Open, Key.SECOND)]),
        (DISK, [act(Open, Key.CURRENT), act(AddKey, DiskError("busy", "", DEVICE))]),
        (DISK, [act(Open, Key.CURRENT), act(AddKey), *LOST]),
        (DISK, [act(Open, Key.CURRENT), act(AddKey), (Send, talk.refused(409, "rotation_superseded"))]),
        (FRESH, [act(Open, Key.CURRENT), act(RemoveMark), act(AddKey), (Send, root_confirmed()), act(KeepKey)]),
        (FRESH, [act(Open, Key.CURRENT), act(RemoveMark, DiskError("busy", "", DEVICE))]),
    ],
)
def test_the_root_disk_opens_whatever_becomes_of_its_rotation(disk: object, script: list[Any]) -> None:
    """A key is taken off it only when the server has said that the next one is active."""
    flow = unlock_root(SETTINGS, ROOT, granted(key_second="s"))
    assert Playbook((InspectDisk, disk), *script, aside=talk.patient()).run(flow).path == "/dev/mapper/cryptroot"


def test_where_both_keys_of_the_root_disk_are_one_it_is_tried_once() -> None:
    def expected(effect: Any) -> bool:
        return isinstance(effect, ActOnDisk) and getattr(effect.action, "keys", None) == (Key.CURRENT,)

    flow = unlock_root(SETTINGS, ROOT, granted(root_next=talk.ROOT))
    script = ((InspectDisk, DISK), (expected, DiskError("no_key_fits", "", DEVICE)))
    with pytest.raises(DiskError):
        _ = Playbook(*script, aside=talk.patient()).run(flow)
