"""The agent's run as a dialogue: what is looked at first, what is wiped, what is left, and what every failure means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.boot._advice import BY_CODE, advise
from chutes_proto.boot._agent import Booted, resume_agent, run_agent
from chutes_proto.boot._disks import OpenVolume, foresee
from chutes_proto.boot._flows import BootGrant
from chutes_proto.effects import ActOnDisk, Flow, InspectDisk, Log, MakeQuote, NextServer, Send, Sleep, Uptime
from chutes_proto.errors import (
    BadRequest,
    BootInterrupted,
    ChutesError,
    ConfigurationError,
    DiskError,
    FileUnavailable,
    HandoverRejected,
    HeaderRejected,
    LocalProtocolError,
    NotInMemory,
    QuoteUnavailable,
    Refused,
    RemoteProtocolError,
    SignatureUnavailable,
    TransportError,
    refusal,
)
from chutes_proto.log import Record
from chutes_proto.luks.disk import Blank, judge
from chutes_proto.luks.plan import Key, Open
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Aside, Playbook
from chutes_proto.wire import vms
from chutes_proto.wire.codec import decode_answer
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Endpoint
from chutes_proto.wire.endpoints import COMMON_CODES
from chutes_proto.wire.http import HttpResponse
from tests.boot import talk
from tests.boot.test_disks import BAD, CACHE, FOREIGN, LOST, LUKS, OPENED, OTHER, STORAGE, VOLUMES, base, synced
from tests.boot.test_rotation import K3S, NONCE
from tests.luks import headers

ROOT = Volume("root", "/dev/vda2")
ROOT_DISK = judge(headers.both(headers.told()), [], headers.SIZE, ROOT.device)
OPEN_ROOT = Open(ROOT.name, ROOT.device, ROOT.mapping, (Key.CURRENT,))
ROOT_OPENED = OpenVolume("root", ROOT.device, "/dev/mapper/root", formatted=False)
MISSING = DiskError("unavailable", "it cannot be opened", STORAGE.device)
SHUT = DiskError("key_refused", "no key opens it", ROOT.device)

LOOK_ROOT: list[tuple[Any, object]] = [(InspectDisk(ROOT.device), ROOT_DISK)]
LOOK: list[tuple[Any, object]] = [(InspectDisk(STORAGE.device), LUKS), (InspectDisk(CACHE.device), OTHER)]
GRANTED: list[tuple[Any, object]] = [
    (Send(talk.ASK_NONCE), talk.nonce_answer()),
    (MakeQuote, b"quote"),
    (talk.is_attestation, talk.grant_answer()),
]
SYNCED: list[tuple[Any, object]] = [
    (Send(talk.sync_request(formatted=["storage", "tdx-cache"])), synced("storage")),
    (base(STORAGE, talk.STORAGE), Key.CURRENT),
    (base(CACHE, talk.CACHE), Key.CURRENT),
]


def run(
    flow: Flow[Any],
    *script: tuple[Any, object],
    uptime: Callable[[], float] = float,
    log: Callable[[Record], object] = id,
) -> Any:
    aside: Aside = {**talk.patient(), Uptime: lambda _: uptime(), Log: lambda effect: log(effect.record)}
    return Playbook(*script, aside=aside).run(flow)


def is_opening_root(effect: Any) -> bool:
    """the root disk is opened with the grant's passphrase"""
    return isinstance(effect, ActOnDisk) and effect == ActOnDisk(OPEN_ROOT, {Key.CURRENT: Secret(talk.ROOT.encode())})


def is_wiped(secret: Secret) -> bool:
    try:
        _ = secret.reveal()
    except ValueError:
        return True
    return False


def test_all_disks_are_looked_at_then_the_root_is_opened_then_the_volumes() -> None:
    booted: Booted = run(
        run_agent(talk.SETTINGS, ROOT, VOLUMES),
        *LOOK_ROOT,
        *LOOK,
        *GRANTED,
        *LOOK_ROOT,
        (is_opening_root, Key.CURRENT),
        *LOOK,
        *SYNCED,
    )
    assert booted.opened == (ROOT_OPENED, *OPENED)
    assert booted.k3s_encryption_key is None
    assert is_wiped(booted.grant.root_passphrase)


def test_volumes_that_are_left_are_not_asked_for() -> None:
    booted: Booted = run(
        run_agent(talk.SETTINGS, ROOT, ()), *LOOK_ROOT, *GRANTED, *LOOK_ROOT, (is_opening_root, Key.CURRENT)
    )
    assert booted.opened == (ROOT_OPENED,)
    assert booted.grant.boot_token == Secret(talk.TOKEN.encode())
    assert is_wiped(booted.grant.root_passphrase)


def test_a_later_run_goes_on_with_the_grant() -> None:
    grant = BootGrant(talk.HOTKEY, talk.VM, Secret(b""), Secret(talk.TOKEN.encode()))
    booted: Booted = run(resume_agent(talk.SETTINGS, VOLUMES, grant), *LOOK, *LOOK, *SYNCED)
    assert booted.opened == OPENED


def test_a_later_run_with_nothing_to_do() -> None:
    with pytest.raises(LocalProtocolError, match="no volumes"):
        run(resume_agent(talk.SETTINGS, (), talk.GRANT))


def test_a_root_disk_that_does_not_open_ends_it_before_the_volumes_are_asked_for() -> None:
    with pytest.raises(DiskError, match="no key opens it"):
        run(run_agent(talk.SETTINGS, ROOT, VOLUMES), *LOOK_ROOT, *LOOK, *GRANTED, *LOOK_ROOT, (is_opening_root, SHUT))


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ([(InspectDisk(ROOT.device), Blank(ROOT.device, headers.SIZE)), *LOOK], "root"),
        ([*LOOK_ROOT, (InspectDisk(STORAGE.device), BAD), *LOOK[1:]], "cipher_null-ecb"),
        ([*LOOK_ROOT, (InspectDisk(STORAGE.device), MISSING), *LOOK[1:]], "cannot be opened"),
    ],
    ids=["blank root", "null cipher", "missing"],
)
def test_a_disk_that_must_not_be_opened_ends_it_before_a_server_is_asked(script: Any, told: str) -> None:
    with pytest.raises(DiskError, match=told):
        run(run_agent(talk.SETTINGS, ROOT, VOLUMES), *script)


def test_no_disks_are_looked_at_where_all_are_left_to_a_later_run() -> None:
    told: list[Record] = []
    assert run(run_agent(talk.SETTINGS, None, ()), *GRANTED, log=told.append).opened == ()
    assert "disks_looked_at" not in {record.event for record in told}


def test_disks_may_take_a_while_to_appear() -> None:
    clock = iter([0.0, 0.0, 1.0, 1.9, 2.0])
    nothing: list[tuple[Any, object]] = [(InspectDisk(STORAGE.device), MISSING), LOOK[1]]
    told: list[Record] = []
    with pytest.raises(DiskError, match="cannot be opened"):
        run(
            run_agent(talk.SETTINGS, None, VOLUMES, disk_wait_seconds=2.0),
            *[*nothing, (Sleep, None)] * 2,
            *nothing,
            uptime=lambda: next(clock),
            log=told.append,
        )
    assert [(record.event, record.fields) for record in told] == [
        ("disks_looked_at", {"devices": ["/dev/vdb", "/dev/disk/by-id/cache"]}),
        ("disks_awaited", {"devices": ["/dev/vdb"], "wait": 2.0}),
        ("disk_failed", {"volume": "storage", "device": "/dev/vdb", "reason": "unavailable", "text": str(MISSING)}),
    ]


def test_disks_are_not_waited_for_beyond_the_deadline() -> None:
    settings = evolve(talk.SETTINGS, retry=evolve(talk.SETTINGS.retry, deadline=2.0))
    clock = iter([0.0, 0.0, 1.0, 2.0])
    nothing: list[tuple[Any, object]] = [(InspectDisk(STORAGE.device), MISSING), LOOK[1]]
    with pytest.raises(DiskError, match="cannot be opened"):
        run(
            run_agent(settings, None, VOLUMES, disk_wait_seconds=60.0),
            *nothing,
            (Sleep, None),
            *nothing,
            uptime=lambda: next(clock),
        )


def test_all_disks_that_must_not_be_opened_are_told() -> None:
    told: list[Record] = []
    with pytest.raises(DiskError, match="cannot be opened"):
        run(
            run_agent(talk.SETTINGS, ROOT, VOLUMES),
            *LOOK_ROOT,
            (InspectDisk(STORAGE.device), MISSING),
            (InspectDisk(CACHE.device), FOREIGN),
            log=told.append,
        )
    assert [(record.event, record.fields["volume"]) for record in told[1:]] == [
        ("disk_failed", "storage"),
        ("disk_failed", "tdx-cache"),
    ]


def test_a_header_that_is_refused_is_not_waited_for() -> None:
    with pytest.raises(DiskError, match="cipher_null-ecb"):
        run(
            run_agent(talk.SETTINGS, None, VOLUMES, disk_wait_seconds=60.0),
            (InspectDisk(STORAGE.device), BAD),
            (InspectDisk(CACHE.device), MISSING),
        )


def test_the_deadline_counts_from_the_beginning_for_all_that_is_asked() -> None:
    """The grant took all the time there was, so the sync is not tried again."""
    settings = evolve(talk.SETTINGS, retry=evolve(talk.SETTINGS.retry, deadline=100.0))
    now = [0.0]

    def late(effect: Any) -> bool:
        now[0] = 99.5
        return talk.is_attestation(effect)

    with pytest.raises(TransportError):
        run(
            run_agent(settings, None, VOLUMES),
            *LOOK,
            *GRANTED[:2],
            (late, talk.grant_answer()),
            *LOOK,
            (Send, LOST),
            uptime=lambda: now[0],
        )


def test_a_token_goes_to_the_next_server_as_it_is() -> None:
    settings = evolve(talk.SETTINGS, retry=evolve(talk.SETTINGS.retry, servers=2))
    booted: Booted = run(
        run_agent(settings, None, VOLUMES),
        *LOOK,
        (Send(talk.ASK_NONCE), LOST),
        (NextServer(), "https://b"),
        *GRANTED,
        *LOOK,
        (SYNCED[0][0], talk.refused(503)),
        (NextServer(), "https://a"),
        *SYNCED,
    )
    assert booted.opened == OPENED


def test_a_server_that_does_not_know_the_token_begins_a_new_boot() -> None:
    settings = evolve(talk.SETTINGS, retry=evolve(talk.SETTINGS.retry, servers=2))
    booted: Booted = run(
        run_agent(settings, None, VOLUMES),
        *LOOK,
        *GRANTED,
        *LOOK,
        (SYNCED[0][0], LOST),
        (NextServer(), "https://b"),
        (SYNCED[0][0], talk.refused(401, "boot_token_invalid")),
        (NextServer(), "https://a"),
        *GRANTED,
        *SYNCED,
    )
    assert booted.opened == OPENED


def test_the_two_phase_exchange_brings_another_key() -> None:
    grant = talk.grant_answer(boot_token=None, luks_quote_nonce=NONCE)
    pairs = {"storage": {"current": None, "next": "n"}}
    content: dict[str, object] = {
        "volumes": pairs,
        "confirm_nonce": "c1" * 32,
        "k3s_encryption_key": K3S,
        "in_use": [],
    }
    blank = Blank(STORAGE.device, headers.SIZE)
    booted: Booted = run(
        run_agent(talk.SETTINGS, None, [STORAGE]),
        (InspectDisk(STORAGE.device), blank),
        *GRANTED[:2],
        (talk.is_attestation, grant),
        (InspectDisk(STORAGE.device), blank),
        (MakeQuote, b"quote"),
        (Send, talk.answer(content)),
        (ActOnDisk, None),
        (ActOnDisk, Key.NEXT),
        (Send, talk.answer({"status": "confirmed", "volumes": {"storage": {"result": "promoted"}}})),
        (ActOnDisk, None),
    )
    assert booted.k3s_encryption_key == Secret(K3S.encode())
    assert [volume.formatted for volume in booted.opened] == [True]


def test_what_is_foreseen_of_the_root_disk_is_never_a_format() -> None:
    root, storage = run(
        foresee(ROOT, [STORAGE]),
        (InspectDisk(ROOT.device), Blank(ROOT.device, headers.SIZE)),
        (InspectDisk(STORAGE.device), Blank(STORAGE.device, headers.SIZE)),
    )
    assert root.error is not None
    assert root.base == root.two_phase == ()
    assert [action.name for action in storage.base] == ["format", "open"]
    root, _ = run(foresee(ROOT, [STORAGE]), *LOOK_ROOT, LOOK[0])
    assert root.base == root.two_phase == (OPEN_ROOT,)


# --- what a failure means ---

BOOT_ENDPOINTS = [endpoint for endpoint in vars(vms).values() if isinstance(endpoint, Endpoint)]
OF_A_WRONG_AGENT = {
    Code.BOOT_TOKEN_REQUIRED,
    Code.HOTKEY_REQUIRED,
    Code.HOTKEY_CONFLICT,
    Code.VOLUMES_REQUIRED,
    Code.REKEY_NOT_SUBSET,
    Code.BODY_TOO_LARGE,
    Code.HEAD_TOO_LARGE,
}
BOOT_CODES = sorted({*COMMON_CODES, *(code for each in BOOT_ENDPOINTS for code in each.codes)} - OF_A_WRONG_AGENT)


@pytest.mark.parametrize("code", BOOT_CODES)
def test_a_code_that_a_boot_can_meet_has_words_of_its_own(code: Code) -> None:
    advice = advise(refusal(code.status, code, "detail"))
    assert advice is BY_CODE[code]
    assert advice == advise(refusal(code.status, str(code), "detail"))  # as a client reads it from the wire


def test_a_page_of_a_proxy_is_not_taken_for_a_word_of_the_server() -> None:
    page = HttpResponse(404, (("content-type", "text/html"),), b"<html><h1>404 Not Found</h1></html>")
    with pytest.raises(Refused) as raised:
        decode_answer(vms.BOOT_NONCE, page)
    assert str(raised.value) == "HTTP status 404, without a text of a key server (404 unknown)"
    assert advise(raised.value).do == "Check servers in the settings, and any proxy on the way."


@pytest.mark.parametrize(
    "error",
    [
        refusal(403, "of_another_version", "detail"),
        refusal(503, "of_another_version", "detail"),
        refusal(418, "of_another_version", "detail"),
        BadRequest(Code.VALIDATION_ERROR, "detail"),
        TransportError("detail", maybe_delivered=True),
        RemoteProtocolError("detail"),
        QuoteUnavailable("detail"),
        DiskError("detail", "detail", "detail"),
        HeaderRejected("detail", "detail", "detail", "detail"),
        ConfigurationError("detail"),
        FileUnavailable("detail"),
        HandoverRejected("detail"),
        NotInMemory("detail"),
        SignatureUnavailable("detail"),
        BootInterrupted("detail"),
        LocalProtocolError("detail"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_means_something_and_repeats_nothing(error: ChutesError) -> None:
    advice = advise(error)
    assert advice.means.endswith(".")
    assert advice.do.endswith(".")
    assert "detail" not in advice.means + advice.do
