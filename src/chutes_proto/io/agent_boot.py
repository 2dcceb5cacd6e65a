"""One boot of the agent, as its settings say, from the identity of the VM to open disks.

Rules kept here:

* a signal ends a boot, but first what is done to a disk is done;
* what is left to a later stage is in a file in memory; a passphrase never is;
* a module is imported where it is first used: an initramfs is short of memory, and a server answers meanwhile.
"""

from __future__ import annotations

import linecache
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from chutes_proto.io.stop_signals import SignalsToStop

if TYPE_CHECKING:
    from chutes_proto.auth.client_identity import ClientIdentity
    from chutes_proto.boot._agent import Booted
    from chutes_proto.boot._settings import AgentSettings, VmIdentity
    from chutes_proto.effects import Flow
    from chutes_proto.io.agent import Servers
    from chutes_proto.io.disks.cryptsetup import Disks
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.quoters.choose import Quoter
    from chutes_proto.log import Record
    from chutes_proto.luks.plan import Action

_LOOK_AGAIN = 0.2
IMAGES = "disks may be images: keys are tried, nothing is mapped"


class Report(Protocol):
    """Takes the records of a boot, and sentences for people; ``step`` is the last one that a record named.

    ``close`` closes the disks that the boot has opened, and reports that.
    """

    step: str
    server: Callable[[], str]
    close: Callable[[], None]

    def __call__(self, record: Record) -> None: ...

    def tell(self, text: str) -> None:
        """One sentence."""
        ...

    def acts(self, action: Action[Any]) -> None:
        """An action on a disk begins."""
        ...


class StoppedError(KeyboardInterrupt):
    """A signal ends the boot."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stops:
    """Signals to stop: a boot that runs ends, but first what is done to a disk; a second one does not wait for that.

    When the boot has ended they end only the wait for what follows a failure, which they never keep away.
    """

    def __init__(self) -> None:
        self._ends_boot = False
        self._at_disk = False
        self._came: int | None = None
        self._to_stop = SignalsToStop()

    def __call__(self, number: int, *_: object) -> None:
        if not self._to_stop.is_another(number):
            return
        waits = self._at_disk and self._came is None
        self._came = number
        if not waits:
            self._end_boot()

    def at_disk(self, *, begins: bool) -> None:
        """Something is done to a disk from now on, or no more. Raises for a signal that came meanwhile."""
        self._at_disk = False
        self._end_boot()
        self._at_disk = begins

    def _end_boot(self) -> None:
        if self._ends_boot and self._came is not None:
            self._ends_boot = False
            raise StoppedError(self._came)

    def boot_begins(self) -> None:
        """Raises for a signal that came before."""
        self._ends_boot = True
        self._end_boot()

    def boot_has_ended(self) -> None:
        self._ends_boot = False
        self._came = None
        self._to_stop = SignalsToStop()  # the next one ends the wait, however soon it comes

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._came is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_AGAIN))


def boot(settings: AgentSettings, report: Report, stops: Stops, *, images: bool) -> Booted:
    """The whole boot, or all of it that is not left to `resume`."""
    from chutes_proto.auth.client_identity import ENTROPY_SIZE, make_client_identity
    from chutes_proto.io.agent import boot_id, make_signer, write_state

    deadline = time.monotonic() + settings.retry.deadline_seconds
    who = identity_of(settings)
    report.tell(f"VM {who.vm_name} of hotkey {who.hotkey.address}")
    _tell_clock(report)
    check_places(settings)
    leaves = settings.volumes_at == "resume"
    state = settings.state
    signer = make_signer(settings.signer, who, deadline)
    client = make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))
    servers = _servers(settings, client, deadline)
    try:
        servers.begin()

        from chutes_proto.boot._agent import run_agent  # while the server answers
        from chutes_proto.boot._flows import BootSettings
        from chutes_proto.boot._handoff import Handoff

        linecache.clearcache()  # all methods that attrs has made, as text: nobody debugs them here, and memory is short

        boot_settings = BootSettings(who.hotkey.address, who.vm_name, client.spki_sha256, signer, settings.policy)
        performer = _performer(settings, report, servers, deadline, images=images)
        volumes = () if leaves else settings.disks
        flow = run_agent(boot_settings, settings.root_disk, volumes, disk_wait_seconds=settings.disk_wait_seconds)
        booted = _driven(flow, performer, report, stops)
    finally:
        servers.close()
    if leaves:
        handover = Handoff(servers.origin, booted.at, boot_id(), booted.grant, client)
        write_state(state.file, handover.encode(), on_disk=state.on_disk)
    _keep_k3s_key(settings, booted)
    return booted


def check_places(settings: AgentSettings, *, make: bool = True) -> None:
    """Raise as `check_place` for each file that `boot` would leave."""
    from chutes_proto.io.agent import check_place

    state = settings.state
    files = (state.file if settings.volumes_at == "resume" else None, state.k3s_key_file)
    for file in filter(None, files):
        check_place(file, on_disk=state.on_disk, make=make)


def resume(settings: AgentSettings, report: Report, stops: Stops, *, images: bool) -> Booted:
    """The part of the boot that `boot` left."""
    from chutes_proto.boot._agent import resume_agent
    from chutes_proto.boot._exchange import may_pass
    from chutes_proto.boot._flows import BootSettings
    from chutes_proto.boot._handoff import MAX_SIZE, Handoff
    from chutes_proto.errors import HandoverRejected, Refusal
    from chutes_proto.io.agent import boot_id, check_place, make_signer, read_state, remove_state

    deadline = time.monotonic() + settings.retry.deadline_seconds
    state = settings.state
    data = read_state(state.file, limit=MAX_SIZE)
    try:
        left = Handoff.decode(data, settings, boot_id=boot_id(), uptime=time.monotonic())
    except HandoverRejected as exc:
        raise HandoverRejected(f"{state.file}: {exc}") from None
    grant, client = left.grant, left.identity
    report.tell(f"going on with the boot of VM {grant.vm_name} of hotkey {grant.miner_hotkey}")
    _tell_clock(report)
    if state.k3s_key_file is not None:
        check_place(state.k3s_key_file, on_disk=state.on_disk)
    signer = None if settings.signer is None else make_signer(settings.signer, identity_of(settings), deadline)
    boot_settings = BootSettings(grant.miner_hotkey, grant.vm_name, client.spki_sha256, signer, settings.policy)
    servers = _servers(settings, client, deadline, first=left.server)
    performer = _performer(settings, report, servers, deadline, images=images)
    try:
        flow = resume_agent(boot_settings, settings.disks, grant, disk_wait_seconds=settings.disk_wait_seconds)
        booted = _driven(flow, performer, report, stops)
    except Refusal as exc:
        if not may_pass(exc):  # final: the file is of no more use
            remove_state(state.file)
        raise
    finally:
        servers.close()
    remove_state(state.file)
    _keep_k3s_key(settings, booted)
    return booted


def _driven(flow: Flow[Booted], performer: Performer, report: Report, stops: Stops) -> Booted:
    """The end of the flow, if no signal is its end."""
    from chutes_proto.effects import ActOnDisk, Effect, Log, run

    def perform(effect: Effect[Any]) -> object:
        match effect:
            case ActOnDisk(action):
                stops.at_disk(begins=True)
                report.acts(action)
            case Log():  # what came of it is told, or nobody would know what is open
                pass
            case _:
                stops.at_disk(begins=False)
        return performer.perform(effect)

    try:
        return run(flow, perform)
    finally:
        stops.at_disk(begins=False)


def _tell_clock(report: Report) -> None:
    """A certificate may fail for it, and what starts in between may set it wrong."""
    report.tell(f"its clock says {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC")


def identity_of(settings: AgentSettings) -> VmIdentity:
    from chutes_proto.boot._settings import MAX_CONFIG_FILE, vm_identity
    from chutes_proto.io.agent import read_config_volume

    directory = settings.config_volume.directory
    asked = settings.asked
    files = read_config_volume(directory, asked, limit=MAX_CONFIG_FILE) if directory and asked else {}
    return vm_identity(settings, files)


def _servers(settings: AgentSettings, client: ClientIdentity, deadline: float, *, first: str = "") -> Servers:
    from chutes_proto.io.agent import Servers
    from chutes_proto.io.http.tls import context_trusting

    context = context_trusting(settings.ca_file, client)
    return Servers(context, settings.servers, deadline, first=first)


def _performer(
    settings: AgentSettings, report: Report, servers: Servers, deadline: float, *, images: bool
) -> Performer:
    from chutes_proto.io.drivers.sync import Performer

    report.server = lambda: servers.origin
    if images:
        report.tell(IMAGES)
    quoter = _quoter(settings, report, deadline)
    opener = disks(images=images, end=deadline)
    report.close = lambda: opener.close(report)
    return Performer(send=servers, next_server=servers.next, quoter=quoter, disks=opener, log=report)


def _quoter(settings: AgentSettings, report: Report, deadline: float) -> Quoter:
    from chutes_proto.io.agent import TimedQuoter
    from chutes_proto.io.quoters.choose import make_quoter

    quoter = make_quoter(settings.quoter, tell=report.tell)
    if not is_simulated(settings):
        return TimedQuoter(quoter, deadline)
    # A VM measures more between its two quotes; a simulated one has to be told.
    later = make_quoter(settings.quoter, stage="runtime")

    def quote(report_data: bytes) -> bytes:
        return later(report_data) if report.step == "runtime quote" else quoter(report_data)

    return quote


def is_simulated(settings: AgentSettings) -> bool:
    return settings.quoter.partition(":")[0] == "simulated"


def disks(*, images: bool, end: float = math.inf) -> Disks:
    from chutes_proto.io.disks.cryptsetup import Disks

    return Disks(images=images, end=end)


def _keep_k3s_key(settings: AgentSettings, booted: Booted) -> None:
    from chutes_proto.io.agent import write_state

    path, key = settings.state.k3s_key_file, booted.k3s_encryption_key
    if path is not None and key is not None:
        write_state(path, key, on_disk=settings.state.on_disk)
