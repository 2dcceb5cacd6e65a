"""The flows of a VM's disks as dialogues: what is looked at, asked, done and left alone, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from chutes_proto.boot._disks import Forecast, OpenVolume, Unlocked, foresee, unlock, unlock_root
from chutes_proto.boot._flows import BootGrant
from chutes_proto.effects import ActOnDisk, Flow, InspectDisk, Log, MakeQuote, Send
from chutes_proto.errors import (
    DiskError,
    HeaderRejected,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    TransportError,
)
from chutes_proto.log import Level, Record
from chutes_proto.luks.disk import Blank, Disk, Foreign, judge
from chutes_proto.luks.plan import AddKey, Format, KeepKey, Key, Open
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Playbook
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.boot import talk
from tests.boot.test_rotation import CONFIRM, K3S, NONCE
from tests.luks import headers

STORAGE, CACHE = Volume("storage", "/dev/vdb"), Volume("tdx-cache", "/dev/disk/by-id/cache", "cache")
VOLUMES = (STORAGE, CACHE)
LUKS, OTHER = (judge(headers.both(headers.told()), [], headers.SIZE, volume.device) for volume in VOLUMES)
BLANK, FOREIGN = Blank(STORAGE.device, headers.SIZE), Foreign(STORAGE.device, headers.SIZE, "XFS")
BAD = HeaderRejected("cipher", "cipher_null-ecb", "aes-xts-plain64", STORAGE.device)
SHUT = DiskError("key_refused", "no key opens it", STORAGE.device)
LOST = TransportError("lost", maybe_delivered=True)
TWO_PHASE = BootGrant(talk.HOTKEY, talk.VM, Secret(b"root"), None, Secret(NONCE.encode()))


class Said:
    """The records that were logged."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def run(self, flow: Flow[Any], *script: tuple[Any, object]) -> Any:
        return Playbook(*script, aside={**talk.patient(), Log: lambda effect: self.records.append(effect.record)}).run(
            flow
        )

    def fields(self, event: str) -> list[Mapping[str, object]]:
        return [record.fields for record in self.records if record.event == event]


@pytest.fixture
def said() -> Said:
    return Said()


def looked(*disks: Disk | DiskError) -> list[tuple[Any, object]]:
    return [(InspectDisk(volume.device), disk) for volume, disk in zip(VOLUMES, disks, strict=False)]


def synced(*in_use: str) -> HttpResponse:
    return talk.keys_answer(in_use=[*in_use])


def handed(*in_use: str, **keys: object) -> tuple[Any, object]:
    pairs = {"storage": {"current": "c", "next": "n"}, "tdx-cache": {"current": "d", "next": "m"}, **keys}
    content = {"volumes": pairs, "confirm_nonce": CONFIRM, "k3s_encryption_key": K3S, "in_use": [*in_use]}
    return (Send, talk.answer(content))


def confirming(report: Mapping[str, bool], **results: str) -> tuple[Any, object]:
    """A confirmation that says this of the volumes, and its answer."""

    def is_it(effect: Any) -> bool:
        expected = ",".join(f'"{name}":{{"rotated":{str(rotated).lower()}}}' for name, rotated in report.items())
        return isinstance(effect, Send) and effect.request.body == f'{{"volumes":{{{expected}}}}}'.encode()

    told = {name: {"result": results.get(name.replace("-", "_"), "promoted")} for name in report}
    return is_it, talk.answer({"status": "confirmed", "volumes": told})


def base(volume: Volume, key: str) -> ActOnDisk[Key]:
    action = Open(volume.name, volume.device, volume.mapping, (Key.CURRENT,))
    return ActOnDisk(action, {Key.CURRENT: Secret(key.encode())})


def pair(current: str | None, following: str) -> dict[Key, Secret]:
    keys = {} if current is None else {Key.CURRENT: Secret(current.encode())}
    return {**keys, Key.NEXT: Secret(following.encode())}


def both(volume: Volume, current: str, following: str) -> ActOnDisk[Key]:
    action = Open(volume.name, volume.device, volume.mapping, (Key.CURRENT, Key.NEXT))
    return ActOnDisk(action, pair(current, following))


def add(volume: Volume, current: str, following: str) -> ActOnDisk[None]:
    return ActOnDisk(AddKey(volume.name, volume.device, Key.NEXT), pair(current, following))


def keep(volume: Volume, current: str | None, following: str) -> ActOnDisk[None]:
    beside = None if current is None else Key.CURRENT
    return ActOnDisk(KeepKey(volume.name, volume.device, Key.NEXT, beside), pair(current, following))


OPENED = tuple(OpenVolume(v.name, v.device, f"/dev/mapper/{v.mapping}", formatted=False) for v in VOLUMES)
ROTATED: Sequence[tuple[Any, object]] = [
    (both(STORAGE, "c", "n"), Key.CURRENT),
    (add(STORAGE, "c", "n"), None),
    (both(CACHE, "d", "m"), Key.CURRENT),
    (add(CACHE, "d", "m"), None),
]
KEPT: Sequence[tuple[Any, object]] = [(keep(STORAGE, "c", "n"), None), (keep(CACHE, "d", "m"), None)]


# --- the base exchange ---


def test_disks_are_looked_at_and_then_a_boot_begins(said: Said) -> None:
    unlocked = said.run(
        unlock(talk.SETTINGS, VOLUMES),
        *looked(LUKS, OTHER),
        (Send(talk.ASK_NONCE), talk.nonce_answer()),
        (MakeQuote, b"quote"),
        (talk.is_attestation, talk.grant_answer()),
        (Send(talk.sync_request(formatted=["storage", "tdx-cache"])), synced("storage")),
        (base(STORAGE, talk.STORAGE), Key.CURRENT),
        (base(CACHE, talk.CACHE), Key.CURRENT),
    )
    assert unlocked == Unlocked(talk.GRANT, OPENED)
    assert [fields["holds"] for fields in said.fields("disk_found")] == [str(LUKS), str(OTHER)]
    assert said.fields("disk_action")[1] == {
        "volume": "tdx-cache",
        "action": "open",
        "device": "/dev/disk/by-id/cache",
        "text": "tdx-cache: open /dev/disk/by-id/cache as /dev/mapper/cache with the current key",
    }
    assert said.fields("disk_opened")[0] == {"volume": "storage", "device": "/dev/vdb", "key": "current"}
    text = "".join(record.as_json("") for record in said.records)
    assert not any(secret in text for secret in (talk.STORAGE, talk.CACHE, talk.TOKEN, talk.ROOT))


def test_a_grant_that_was_handed_over_is_gone_on_with_and_a_blank_disk_formatted(said: Said) -> None:
    key = {Key.CURRENT: Secret(talk.STORAGE.encode())}
    unlocked = said.run(
        unlock(talk.SETTINGS, VOLUMES, grant=talk.GRANT),
        *looked(BLANK, OTHER),
        (Send(talk.sync_request(formatted=["tdx-cache"])), synced("tdx-cache")),
        (ActOnDisk(Format("storage", "/dev/vdb", Key.CURRENT), key), None),
        (base(STORAGE, talk.STORAGE), Key.CURRENT),
        (base(CACHE, talk.CACHE), Key.CURRENT),
    )
    assert [volume.formatted for volume in unlocked.volumes] == [True, False]


def test_a_blank_disk_in_use_stops_the_boot_before_any_disk_is_touched(said: Said) -> None:
    with pytest.raises(DiskError, match="server knows it to hold data") as caught:
        said.run(
            unlock(talk.SETTINGS, [CACHE, STORAGE], grant=talk.GRANT),
            (InspectDisk(CACHE.device), OTHER),
            (InspectDisk(STORAGE.device), BLANK),
            (Send, synced("storage")),
        )
    assert (caught.value.reason, caught.value.device) == ("blank_in_use", "/dev/vdb")
    assert "keys allow-format NAME storage" in str(caught.value)
    assert said.fields("disk_failed")[0]["reason"] == "blank_in_use"


@pytest.mark.parametrize(
    ("disk", "reason"), [(FOREIGN, "foreign"), (BAD, "cipher"), (DiskError("kind", "it is a pipe", "/dev/vdb"), "kind")]
)
def test_a_disk_that_must_not_be_touched_stops_it_before_a_server_is_asked(
    said: Said, disk: Disk | DiskError, reason: str
) -> None:
    with pytest.raises(DiskError) as caught:
        said.run(unlock(talk.SETTINGS, VOLUMES), *looked(disk, *([OTHER] if isinstance(disk, Foreign) else [])))
    assert caught.value.reason == reason
    (failed,) = said.fields("disk_failed")
    assert failed == {"volume": "storage", "device": "/dev/vdb", "reason": reason, "text": str(caught.value)}
    assert [record.level for record in said.records][-1] is Level.ERROR


def test_a_disk_that_does_not_open_is_told_when_the_others_are_open(said: Said) -> None:
    with pytest.raises(DiskError, match="no key opens it"):
        said.run(
            unlock(talk.SETTINGS, VOLUMES, grant=talk.GRANT),
            *looked(LUKS, OTHER),
            (Send, synced()),
            (base(STORAGE, talk.STORAGE), SHUT),
            (base(CACHE, talk.CACHE), Key.CURRENT),
        )
    assert [fields["volume"] for fields in said.fields("disk_opened")] == ["tdx-cache"]


def test_a_format_that_failed_is_not_opened(said: Said) -> None:
    with pytest.raises(DiskError, match="it forgets"):
        said.run(
            unlock(talk.SETTINGS, [STORAGE], grant=talk.GRANT),
            (InspectDisk(STORAGE.device), BLANK),
            (Send, talk.answer({"storage": "s", "in_use": []})),
            (ActOnDisk, DiskError("write_lost", "it forgets", "/dev/vdb")),
        )


def test_a_token_that_died_begins_a_new_boot_even_into_the_other_exchange(said: Said) -> None:
    unlocked = said.run(
        unlock(talk.SETTINGS, VOLUMES, grant=talk.GRANT),
        *looked(LUKS, OTHER),
        (Send, talk.refused(401, "boot_token_invalid")),
        (Send(talk.ASK_NONCE), talk.nonce_answer()),
        (MakeQuote, b"quote"),
        (talk.is_attestation, talk.grant_answer(boot_token=None, luks_quote_nonce=NONCE)),
        (MakeQuote(bytes.fromhex(NONCE) + talk.DIGEST), b"quote"),
        handed(),
        *ROTATED,
        confirming({"storage": True, "tdx-cache": True}),
        *KEPT,
    )
    assert unlocked.grant.luks_quote_nonce == Secret(NONCE.encode())
    assert unlocked.volumes == OPENED


@pytest.mark.parametrize("volumes", [(), (STORAGE, STORAGE), (STORAGE, Volume("storage", "/dev/vdc"))])
def test_volumes_that_no_boot_can_have(volumes: tuple[Volume, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        _ = Playbook().run(unlock(talk.SETTINGS, volumes))


# --- rotation ---


def rotate(said: Said, *script: tuple[Any, object], disks: Sequence[Disk] = (LUKS, OTHER)) -> Unlocked:
    unlocked: Unlocked = said.run(
        unlock(talk.SETTINGS, VOLUMES, grant=TWO_PHASE), *looked(*disks), (MakeQuote, b"quote"), *script
    )
    assert unlocked.k3s_encryption_key == Secret(K3S.encode())
    return unlocked


def test_a_promoted_key_stays_alone(said: Said) -> None:
    rotated = {"storage": True, "tdx-cache": True}
    assert rotate(said, handed(), *ROTATED, confirming(rotated), *KEPT).volumes == OPENED


def test_only_promoted_takes_keys_off(said: Said) -> None:
    rotated = {"storage": True, "tdx-cache": True}
    for other in ("no_pending", "discarded", "PROMOTED", ""):
        _ = rotate(said, handed(), *ROTATED, confirming(rotated, storage=other), KEPT[1])


@pytest.mark.parametrize(
    "answers",
    [
        [LOST] * talk.SETTINGS.retry.attempts,
        [talk.refused(409, "rotation_superseded")],
        [talk.refused(401, "confirm_nonce_invalid")],
        [talk.answer({"status": "confirmed", "volumes": {}})] * talk.SETTINGS.retry.attempts,
        [talk.answer({"status": "confirmed", "volumes": {"storage": {"result": "promoted"}}})]
        * talk.SETTINGS.retry.attempts,
        [HttpResponse(200, talk.JSON, b"garbage")] * talk.SETTINGS.retry.attempts,
        [HttpResponse(307, (("location", "https://elsewhere/"),), b"")] * talk.SETTINGS.retry.attempts,
    ],
    ids=["lost", "superseded", "unknown nonce", "empty", "half", "garbage", "redirect"],
)
def test_an_unknown_answer_keeps_both_keys_and_the_disks_are_open(said: Said, answers: list[object]) -> None:
    assert rotate(said, handed(), *ROTATED, *[(Send, answer) for answer in answers]).volumes == OPENED
    (undecided,) = said.fields("rotation_undecided")
    assert undecided["volumes"] == ["storage", "tdx-cache"]
    assert CONFIRM not in str(said.records)


def test_where_no_rotation_is_due_nothing_is_added_or_taken_off(said: Said) -> None:
    opening = ActOnDisk(Open("storage", "/dev/vdb", "storage", (Key.CURRENT,)), pair("c", "c"))
    answer = confirming({"storage": True, "tdx-cache": True}, storage="no_pending")
    unlocked = rotate(
        said, handed(storage={"current": "c", "next": "c"}), (opening, Key.CURRENT), *ROTATED[2:], answer, KEPT[1]
    )
    assert unlocked.volumes == OPENED


def test_a_disk_that_the_next_key_opens_is_confirmed_too(said: Said) -> None:
    script = [(both(STORAGE, "c", "n"), Key.NEXT), *ROTATED[1:]]
    _ = rotate(said, handed(), *script, confirming({"storage": True, "tdx-cache": True}), *KEPT)
    assert said.fields("disk_opened")[0]["key"] == "next"


def test_a_key_that_could_not_be_added_leaves_the_old_one_and_the_disk_open(said: Said) -> None:
    script = [ROTATED[0], (add(STORAGE, "c", "n"), DiskError("write_lost", "gone", "/dev/vdb")), *ROTATED[2:]]
    report = {"storage": False, "tdx-cache": True}
    assert rotate(said, handed(), *script, confirming(report, storage="discarded"), KEPT[1]).volumes == OPENED


def test_nothing_is_said_of_a_disk_that_next_opened_and_that_then_failed(said: Said) -> None:
    script = [
        (both(STORAGE, "c", "n"), Key.NEXT),
        (add(STORAGE, "c", "n"), DiskError("unreadable", "gone", "/dev/vdb")),
        *ROTATED[2:],
    ]
    assert rotate(said, handed(), *script, confirming({"tdx-cache": True}), KEPT[1]).volumes == OPENED


def test_a_disk_that_does_not_open_is_left_out_of_the_confirmation(said: Said) -> None:
    script = [(both(STORAGE, "c", "n"), SHUT), *ROTATED[2:], confirming({"tdx-cache": True}), KEPT[1]]
    with pytest.raises(DiskError, match="no key opens it"):
        _ = rotate(said, handed(), *script)


def test_where_no_disk_opens_nothing_is_confirmed(said: Said) -> None:
    with pytest.raises(DiskError, match="no key opens it"):
        _ = rotate(said, handed(), (both(STORAGE, "c", "n"), SHUT), (both(CACHE, "d", "m"), SHUT))


def test_keys_that_stay_after_a_promotion_are_no_failure(said: Said) -> None:
    rotated = {"storage": True, "tdx-cache": True}
    script = [*ROTATED, confirming(rotated), (KEPT[0][0], DiskError("timeout", "slow", "/dev/vdb")), KEPT[1]]
    assert rotate(said, handed(), *script).volumes == OPENED
    assert said.fields("disk_failed")[0]["reason"] == "timeout"


def test_the_first_format_is_with_next_alone(said: Said) -> None:
    opening = Open("storage", "/dev/vdb", "storage", (Key.NEXT,))
    unlocked = rotate(
        said,
        handed(storage={"current": None, "next": "n"}),
        (ActOnDisk(Format("storage", "/dev/vdb", Key.NEXT), pair(None, "n")), None),
        (ActOnDisk(opening, pair(None, "n")), Key.NEXT),
        *ROTATED[2:],
        confirming({"storage": True, "tdx-cache": True}),
        (keep(STORAGE, None, "n"), None),
        KEPT[1],
        disks=(BLANK, OTHER),
    )
    assert [volume.formatted for volume in unlocked.volumes] == [True, False]


def test_a_first_format_that_was_cut_off_is_with_current_and_then_rotates(said: Said) -> None:
    opening = Open("storage", "/dev/vdb", "storage", (Key.CURRENT,))
    _ = rotate(
        said,
        handed(),
        (ActOnDisk(Format("storage", "/dev/vdb", Key.CURRENT), pair("c", "n")), None),
        (ActOnDisk(opening, pair("c", "n")), Key.CURRENT),
        *ROTATED[1:],
        confirming({"storage": True, "tdx-cache": True}),
        *KEPT,
        disks=(BLANK, OTHER),
    )


def test_a_blank_disk_in_use_stops_a_rotation_too(said: Said) -> None:
    with pytest.raises(DiskError, match="server knows it to hold data"):
        _ = rotate(said, handed("storage"), disks=(BLANK, OTHER))


# --- keys are wiped ---


@pytest.mark.parametrize("grant", [talk.GRANT, TWO_PHASE], ids=["base", "two-phase"])
@pytest.mark.parametrize("failing", [False, True])
def test_keys_are_wiped_whatever_happens(grant: BootGrant, failing: bool) -> None:
    seen: list[Secret] = []

    def act(effect: ActOnDisk[Any]) -> object:
        seen.extend(effect.keys.values())
        assert all(secret.reveal() for secret in effect.keys.values())
        if failing:
            raise SHUT
        return Key.CURRENT if isinstance(effect.action, Open) else None

    def serve(effect: Send) -> HttpResponse:
        request: HttpRequest = effect.request
        if request.target.endswith("/attest"):
            answer = handed()[1]
        elif request.target.endswith("/confirm"):
            answer = confirming({"storage": True, "tdx-cache": True})[1]
        else:
            answer = synced()
        assert isinstance(answer, HttpResponse)
        return answer

    def quote(_: MakeQuote) -> bytes:
        return b"q"

    def look(_: InspectDisk) -> Disk:
        return LUKS

    aside: dict[type[Any], Any] = {**talk.patient(), ActOnDisk: act, Send: serve, MakeQuote: quote, InspectDisk: look}
    flow = unlock(talk.SETTINGS, VOLUMES, grant=grant)
    if failing:
        with pytest.raises(DiskError):
            _ = Playbook(aside=aside).run(flow)
    else:
        _ = Playbook(aside=aside).run(flow)
    assert seen
    for secret in seen:
        with pytest.raises(ValueError, match="wiped"):
            _ = secret.reveal()


# --- the root disk, and what would be done ---


def test_the_root_disk_is_opened_with_the_passphrase_of_the_grant(said: Said) -> None:
    root = Volume("root", "/dev/vda3", "cryptroot")
    opened = said.run(
        unlock_root(talk.SETTINGS, root, talk.GRANT),
        (InspectDisk("/dev/vda3"), LUKS),
        (base(root, talk.ROOT), Key.CURRENT),
    )
    assert opened == OpenVolume("root", "/dev/vda3", "/dev/mapper/cryptroot", formatted=False)
    for disk in (BLANK, FOREIGN):
        with pytest.raises(DiskError):
            said.run(unlock_root(talk.SETTINGS, root, talk.GRANT), (InspectDisk("/dev/vda3"), disk))
    with pytest.raises(DiskError):
        said.run(unlock_root(talk.SETTINGS, root, talk.GRANT), (InspectDisk("/dev/vda3"), LUKS), (ActOnDisk, SHUT))


def test_what_would_be_done_is_said_without_a_server(said: Said) -> None:
    storage, cache = said.run(foresee(None, VOLUMES), *looked(BLANK, OTHER))
    assert [str(action) for action in storage.two_phase] == [
        "storage: format /dev/vdb as LUKS2 with the current key",
        "storage: open /dev/vdb as /dev/mapper/storage with the current key",
        "storage: add the next key to /dev/vdb unless it has it, and test it",
        "storage: take every key but the next and the current one off /dev/vdb",
    ]
    assert storage.base == storage.two_phase[:2]
    assert "does not know it to hold data; else the boot stops" in storage.condition
    assert (cache.disk, cache.condition, cache.error) == (OTHER, "", None)
    foreign, bad = said.run(
        foresee(None, VOLUMES), (InspectDisk(STORAGE.device), FOREIGN), (InspectDisk(CACHE.device), BAD)
    )
    assert isinstance(foreign, Forecast)
    assert isinstance(foreign.error, DiskError)
    assert (foreign.disk, foreign.base, foreign.error.reason) == (FOREIGN, (), "foreign")
    assert (bad.disk, bad.two_phase, bad.error) == (None, (), BAD)


def test_a_server_that_refuses_leaves_the_disks_alone(said: Said) -> None:
    with pytest.raises(Refused):
        said.run(unlock(talk.SETTINGS, VOLUMES), *looked(BLANK, OTHER), (Send, talk.refused(403, "hotkey_rejected")))


@pytest.mark.parametrize(
    "content",
    [
        {"storage": "s", "in_use": []},
        {"storage": "", "tdx-cache": "c", "in_use": []},
        {"storage": "s", "tdx-cache": "c", "other": "o", "in_use": []},
        {"storage": "s", "tdx-cache": None, "in_use": []},
    ],
    ids=["half", "empty key", "another's key", "null"],
)
def test_an_answer_that_is_not_whole_touches_no_disk(said: Said, content: object) -> None:
    answers = [(Send, talk.answer(content))] * talk.SETTINGS.retry.attempts
    with pytest.raises(RemoteProtocolError):
        said.run(unlock(talk.SETTINGS, VOLUMES, grant=talk.GRANT), *looked(BLANK, OTHER), *answers)
    assert not said.fields("disk_action")
