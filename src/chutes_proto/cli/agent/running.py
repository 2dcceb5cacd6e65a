"""What `agent` does: a whole boot, in the initramfs and in the booted system.

Rules kept here:

* every failure, also a fault of the agent's own and a signal that ends it, is told, closes what this run opened, and
  ends as the settings say;
* what is left to a later stage is in a file in memory; a passphrase never is.
"""

from __future__ import annotations

import argparse
import linecache
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from chutes_proto._error import ChutesError
from chutes_proto.cli import console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chutes_proto.auth.client_identity import ClientIdentity
    from chutes_proto.boot._agent import Booted
    from chutes_proto.boot._disks import Forecast
    from chutes_proto.boot._settings import AgentSettings, VmIdentity
    from chutes_proto.cli.agent.progress import Progress
    from chutes_proto.effects import Flow
    from chutes_proto.io.agent import Servers
    from chutes_proto.io.disks.cryptsetup import Disks
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.quoters.choose import Quoter
    from chutes_proto.log import Value

_MAX_SETTINGS = 64 * 1024
_LOOK_AGAIN = 0.2
_SIGNALLED = 128  # what a shell adds to the number of a signal that ended a program
_IMAGES = "disks may be images: keys are tried, nothing is mapped"


def run(options: argparse.Namespace) -> int:
    from chutes_proto.cli.agent.progress import Progress

    settings = _settings(options.config)
    if options.action == "run" and options.dry_run:
        return _foresee(options, settings)
    progress = Progress(as_json=options.json, seconds=settings.retry.deadline_seconds)
    stops = _Stops()
    before = {number: signal.signal(number, stops) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _done(options, settings, progress, stops)
    finally:
        for number, handler in before.items():
            _ = signal.signal(number, handler)


class _StoppedError(KeyboardInterrupt):
    """A signal ends the boot."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Stops:
    """SIGINT and SIGTERM: a boot that runs ends, but first what is done to a disk; a second one does not wait for that.

    When the boot has ended they end only the wait for what follows a failure, which they never keep away.
    """

    def __init__(self) -> None:
        self._ends_boot = False
        self._at_disk = False
        self._came: int | None = None

    def __call__(self, number: int, *_: object) -> None:
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
            raise _StoppedError(self._came)

    def boot_begins(self) -> None:
        """Raises for a signal that came before."""
        self._ends_boot = True
        self._end_boot()

    def boot_has_ended(self) -> None:
        self._ends_boot = False
        self._came = None

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._came is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_AGAIN))


def _done(options: argparse.Namespace, settings: AgentSettings, progress: Progress, stops: _Stops) -> int:
    """The exit code, when all is done that follows a failure too."""
    from chutes_proto.errors import BootInterrupted, DiskError, LocalProtocolError, Refusal
    from chutes_proto.io.agent import end_with

    try:
        try:
            stops.boot_begins()
            booted = (_resume if options.action == "resume" else _run)(options, settings, progress, stops)
        finally:
            stops.boot_has_ended()
    except ChutesError as exc:
        code = console.REFUSED if isinstance(exc, Refusal | DiskError) else console.USAGE
        error: ChutesError = exc
    except _StoppedError as exc:
        code, error = _SIGNALLED + exc.number, BootInterrupted(f"ended by {signal.Signals(exc.number).name}")
    except Exception as exc:  # noqa: BLE001 - whatever happens, the boot ends as the settings say
        import sys
        import traceback

        from chutes_proto.cli.agent.progress import put

        put("".join(traceback.format_tb(exc.__traceback__)), sys.stderr)  # not what it says, which nobody has looked at
        code = console.USAGE
        error = LocalProtocolError(f"a fault of the agent's own, {type(exc).__name__}; its trace is above")
    else:
        _tell_done(options, settings, progress, booted)
        return console.GRANTED
    _tell_failure(options, settings, progress, error, code)
    ending = settings.on_failure
    if ending.action != "exit":
        fault = end_with(ending.command, ending.wait_seconds, sleep=stops.wait)
        if fault is not None:
            progress.tell(f"{ending.action}: {fault}")
    return code


def _settings(path: str) -> AgentSettings:
    from chutes_proto.boot._settings import AgentSettings
    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.files import read_file

    try:
        return AgentSettings.from_toml(read_file(path, limit=_MAX_SETTINGS))
    except ConfigurationError as exc:
        if str(exc).startswith(path):
            raise
        raise ConfigurationError(f"{path}: {exc}") from None


# --- what is done ---


def _run(options: argparse.Namespace, settings: AgentSettings, progress: Progress, stops: _Stops) -> Booted:
    from chutes_proto.auth.client_identity import ENTROPY_SIZE, make_client_identity
    from chutes_proto.io.agent import boot_id, check_place, make_signer, write_state

    deadline = time.monotonic() + settings.retry.deadline_seconds
    who = _identity(settings)
    progress.tell(f"VM {who.vm_name} of hotkey {who.hotkey.address}")
    _tell_clock(progress)
    leaves = settings.volumes_at == "resume"
    state = settings.state
    if leaves:
        check_place(state.file, on_disk=state.on_disk)
    if state.k3s_key_file is not None:
        check_place(state.k3s_key_file, on_disk=state.on_disk)
    signer = make_signer(settings.signer, who, deadline)
    client = make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))
    servers = _servers(settings, client, deadline)
    try:
        servers.begin()

        from chutes_proto.boot._agent import run_agent  # while the server answers
        from chutes_proto.boot._flows import BootSettings
        from chutes_proto.boot._handoff import Handover

        linecache.clearcache()  # all methods that attrs has made, as text: nobody debugs them here, and memory is short

        boot_settings = BootSettings(who.hotkey.address, who.vm_name, client.spki_sha256, signer, settings.policy)
        performer = _performer(options, settings, progress, servers, deadline)
        volumes = () if leaves else settings.disks
        flow = run_agent(boot_settings, settings.root_disk, volumes, patience=settings.disk_wait_seconds)
        booted = _driven(flow, performer, progress, stops)
    finally:
        servers.close()
    if leaves:
        handover = Handover(servers.origin, booted.at, boot_id(), booted.grant, client)
        write_state(state.file, handover.encode(), on_disk=state.on_disk)
    _keep_k3s_key(settings, booted)
    return booted


def _resume(options: argparse.Namespace, settings: AgentSettings, progress: Progress, stops: _Stops) -> Booted:
    from chutes_proto.boot._agent import resume_agent
    from chutes_proto.boot._flows import BootSettings
    from chutes_proto.boot._handoff import MAX_SIZE, Handover
    from chutes_proto.errors import HandoverRejected, Refusal, Unavailable
    from chutes_proto.io.agent import boot_id, check_place, make_signer, read_state, remove_state

    deadline = time.monotonic() + settings.retry.deadline_seconds
    state = settings.state
    data = read_state(state.file, limit=MAX_SIZE)
    try:
        left = Handover.decode(data, settings, boot_id=boot_id(), uptime=time.monotonic())
    except HandoverRejected as exc:
        raise HandoverRejected(f"{state.file}: {exc}") from None
    grant, client = left.grant, left.identity
    progress.tell(f"going on with the boot of VM {grant.vm_name} of hotkey {grant.miner_hotkey}")
    _tell_clock(progress)
    if state.k3s_key_file is not None:
        check_place(state.k3s_key_file, on_disk=state.on_disk)
    signer = None if settings.signer is None else make_signer(settings.signer, _identity(settings), deadline)
    boot_settings = BootSettings(grant.miner_hotkey, grant.vm_name, client.spki_sha256, signer, settings.policy)
    servers = _servers(settings, client, deadline, first=left.server)
    performer = _performer(options, settings, progress, servers, deadline)
    try:
        flow = resume_agent(boot_settings, settings.disks, grant, patience=settings.disk_wait_seconds)
        booted = _driven(flow, performer, progress, stops)
    except Refusal as exc:
        if not isinstance(exc, Unavailable):  # final: the file is of no more use
            remove_state(state.file)
        raise
    finally:
        servers.close()
    remove_state(state.file)
    _keep_k3s_key(settings, booted)
    return booted


def _driven(flow: Flow[Booted], performer: Performer, progress: Progress, stops: _Stops) -> Booted:
    """The end of the flow, if no signal is its end."""
    from chutes_proto.effects import ActOnDisk, Effect, Log, run

    def perform(effect: Effect[Any]) -> object:
        match effect:
            case ActOnDisk(action):
                stops.at_disk(begins=True)
                progress.acts(action)
            case Log():  # what came of it is told, or nobody would know what is open
                pass
            case _:
                stops.at_disk(begins=False)
        return performer.perform(effect)

    try:
        return run(flow, perform)
    finally:
        stops.at_disk(begins=False)


def _tell_clock(progress: Progress) -> None:
    """A certificate may fail for it, and what starts in between may set it wrong."""
    progress.tell(f"its clock says {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC")


def _identity(settings: AgentSettings) -> VmIdentity:
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
    options: argparse.Namespace, settings: AgentSettings, progress: Progress, servers: Servers, deadline: float
) -> Performer:
    from chutes_proto.io.drivers.sync import Performer

    progress.server = lambda: servers.origin
    if options.images:
        progress.tell(_IMAGES)
    quoter = _quoter(settings, progress, deadline)
    disks = _disks(options, deadline)
    return Performer(send=servers, next_server=servers.next, quoter=quoter, disks=disks, log=progress)


def _quoter(settings: AgentSettings, progress: Progress, deadline: float) -> Quoter:
    from chutes_proto.io.agent import TimedQuoter
    from chutes_proto.io.quoters.choose import make_quoter

    quoter = make_quoter(settings.quoter, tell=progress.tell)
    if not _is_simulated(settings):
        return TimedQuoter(quoter, deadline)
    # A VM measures more between its two quotes; a simulated one has to be told.
    later = make_quoter(settings.quoter, stage="runtime")

    def quote(report_data: bytes) -> bytes:
        return later(report_data) if progress.step == "runtime quote" else quoter(report_data)

    return quote


def _is_simulated(settings: AgentSettings) -> bool:
    return settings.quoter.partition(":")[0] == "simulated"


def _disks(options: argparse.Namespace, deadline: float = math.inf) -> Disks:
    from chutes_proto.io.disks.cryptsetup import Disks

    return Disks(images=options.images, mapping=not options.images, end=deadline)


def _keep_k3s_key(settings: AgentSettings, booted: Booted) -> None:
    from chutes_proto.io.agent import write_state

    path, key = settings.state.k3s_key_file, booted.k3s_encryption_key
    if path is not None and key is not None:
        write_state(path, key, on_disk=settings.state.on_disk)


# --- what is told ---


def _tell_done(options: argparse.Namespace, settings: AgentSettings, progress: Progress, booted: Booted) -> None:
    from chutes_proto.boot._handoff import LIFE

    fields: dict[str, Value] = {
        "vm_name": booted.grant.vm_name,
        "hotkey": booted.grant.miner_hotkey,
        "opened": [f"{it.name}: {it.device if options.images else it.mapping}" for it in booted.opened],
        "formatted": [volume.name for volume in booted.opened if volume.formatted],
    }
    is_left = settings.volumes and not any(volume.name in settings.volumes for volume in booted.opened)
    lines = [("", f"DONE: VM {booted.grant.vm_name} is {'attested' if is_left else 'booted'}")]
    for volume in booted.opened:
        new = ", formatted just now: it needs a file system" if volume.formatted else ""
        opened = "its key fits" if options.images else f"open as {volume.mapping}"
        lines.append((volume.name, f"{volume.device}: {opened}{new}"))
    if is_left:
        fields["left"] = settings.state.file
        lines.append(("volumes", f"left to `chutes-proto agent resume`, within {LIFE // 60} minutes"))
    progress.finish("agent_done", fields, lines, failed=False)


def _tell_failure(
    options: argparse.Namespace, settings: AgentSettings, progress: Progress, error: ChutesError, code: int
) -> None:
    """Close what this run has opened, and say what has happened, what it means and what comes next."""
    from chutes_proto.boot._advice import advise
    from chutes_proto.cli.agent.progress import said
    from chutes_proto.errors import DiskError

    if not options.images:
        close_opened(settings, progress)
    stopped: Mapping[str, Value] = {} if isinstance(error, DiskError) else progress.stopped
    advice, ending, facts = advise(error), settings.on_failure, said(error, stopped)
    step = str(stopped.get("step", ""))
    where = f" at step {step}, at {progress.server()}" if step else ""
    lines = [("", f"BOOT FAILED{where}"), ("reason", facts["reason"])]
    if "status" in facts:
        lines.append(("code", f"{facts['code']} (status {facts['status']})"))
    if facts.get("request_id"):
        lines.append(("request", f"{facts['request_id']} (the server's log has the reason under it)"))
    written = "; ".join(progress.written) or "nothing was written to any"
    lines += [("means", advice.means), ("do", advice.do), ("disks", written)]
    if ending.action != "exit":
        at_once = " (Ctrl-C: at once)" if _has_terminal() else ""
        lines.append(("next", f"{ending.action} in {ending.wait_seconds:g} s{at_once}"))
    fields: dict[str, Value] = {"step": step, "server": progress.server(), **facts}
    fields |= {
        "means": advice.means,
        "do": advice.do,
        "written": list(progress.written),
        "next": ending.action,
        "wait": ending.wait_seconds,
        "exit_code": code,
    }
    progress.finish("agent_failed", fields, lines, failed=True)


def _has_terminal() -> bool:
    """Whether Ctrl-C comes here: in an initramfs and in a unit of systemd the console is nobody's terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def close_opened(settings: AgentSettings, progress: Progress) -> None:
    """Unmap what this run has opened: who comes to the console of a failed boot finds no open disk."""
    from chutes_proto.io.agent import close_mappings
    from chutes_proto.io.disks.cryptsetup import find_cryptsetup

    mappings = {volume.name: volume.mapping for volume in (*filter(None, [settings.root_disk]), *settings.disks)}
    opened = [mappings[name] for name in progress.opened]
    problems = close_mappings(find_cryptsetup(), opened) if opened else []
    for problem in problems:
        progress.tell(f"could not be closed: {problem}")
    if opened and not problems:
        progress.tell(f"closed again: {', '.join(opened)}")


def _foresee(options: argparse.Namespace, settings: AgentSettings) -> int:
    from chutes_proto.boot._agent import foresee
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.quoters.choose import make_quoter

    who = _identity(settings)
    if not _is_simulated(settings):  # to make one would make its platform
        _ = make_quoter(settings.quoter)
    if settings.ca_file is not None:
        from chutes_proto.io.http.tls import context_trusting

        _ = context_trusting(settings.ca_file)
    seen = Performer(disks=_disks(options)).run(foresee(settings.root_disk, settings.disks))
    stops = any(forecast.error is not None for forecast in seen)
    if options.json:
        console.say_json(
            {
                "vm_name": who.vm_name,
                "hotkey": who.hotkey.address,
                "servers": list(settings.servers),
                "stops": stops,
                "disks": [_forecast_json(forecast) for forecast in seen],
            }
        )
        return console.REFUSED if stops else console.GRANTED
    console.say(f"VM {who.vm_name} of hotkey {who.hotkey.address}")
    console.say(f"servers: {', '.join(settings.servers)}")
    console.say(f"quotes: {settings.quoter}")
    if options.images:
        console.say(_IMAGES)
    for forecast in seen:
        _say_forecast(forecast, settings)
    if stops:
        console.say("the boot would stop before a server is asked")
    else:
        console.say("not known without the server: which exchange, which volumes hold data, whether the keys fit")
    return console.REFUSED if stops else console.GRANTED


def _forecast_json(forecast: Forecast) -> dict[str, object]:
    return {
        "volume": forecast.volume.name,
        "device": forecast.volume.device,
        "holds": None if forecast.disk is None else str(forecast.disk),
        "error": None if forecast.error is None else {"reason": forecast.error.reason, "text": str(forecast.error)},
        "condition": forecast.condition,
        "base": [action.as_dict() for action in forecast.base],
        "two_phase": [action.as_dict() for action in forecast.two_phase],
    }


def _say_forecast(forecast: Forecast, settings: AgentSettings) -> None:
    name = forecast.volume.name
    console.say(f"{name}: {forecast.volume.device}" + (f": {forecast.disk}" if forecast.disk else ""))
    if forecast.error is not None:
        console.say(f"  stops: {forecast.error}")
        return
    if name in settings.volumes and settings.volumes_at == "resume":
        console.say("  at `agent resume`:")
    if forecast.condition:
        console.say(f"  if {forecast.condition}:")
    for action in forecast.base:
        console.say(f"  {str(action).removeprefix(f'{name}: ')}")
    for action in forecast.two_phase[len(forecast.base) :]:
        console.say(f"  in the two-phase exchange: {str(action).removeprefix(f'{name}: ')}")
