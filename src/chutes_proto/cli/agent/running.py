"""Run `agent`, in the initramfs and in the booted system, and say how it ended.

Rules kept here:

* every failure, also a fault of the agent's own and a signal that ends it, is told, closes what this run opened, and
  ends as the settings say;
* once it has ended, no signal changes how: the initramfs would take open disks for those of a failed boot.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING

from chutes_proto._error import ChutesError
from chutes_proto.cli import console
from chutes_proto.io.agent_boot import (
    IMAGES,
    StoppedError,
    Stops,
    boot,
    check_places,
    disks,
    identity_of,
    is_simulated,
    resume,
)
from chutes_proto.io.stop_signals import STOPS, ignore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chutes_proto.boot._agent import Booted
    from chutes_proto.boot._disks import Forecast
    from chutes_proto.boot._settings import AgentSettings
    from chutes_proto.cli.agent.progress import Progress
    from chutes_proto.log import Value

_MAX_SETTINGS = 64 * 1024
_SIGNALLED = 128  # what a shell adds to the number of a signal that ended a program
_OF_TERMINALS = (signal.SIGHUP, signal.SIGQUIT)  # the second would leave a core file, with keys in it


def run(options: argparse.Namespace) -> int:
    from chutes_proto.cli.agent.progress import Progress

    settings = _settings(options.config)
    if options.action == "run" and options.dry_run:
        return _foresee(options, settings)
    progress = Progress(as_json=options.json, seconds=settings.retry.deadline_seconds)
    stops = Stops()
    signals = (*STOPS, *(one for one in _OF_TERMINALS if signal.getsignal(one) is not signal.SIG_IGN))  # as by `nohup`
    for number in signals:
        _ = signal.signal(number, stops)
    try:
        return _done(options, settings, progress, stops)
    finally:
        ignore(signals)


def _done(options: argparse.Namespace, settings: AgentSettings, progress: Progress, stops: Stops) -> int:
    """The exit code, when all is done that follows a failure too."""
    from chutes_proto.errors import BootInterrupted, DiskError, LocalProtocolError, Refusal
    from chutes_proto.io.agent import end_with

    try:
        try:
            stops.boot_begins()
            go = resume if options.action == "resume" else boot
            booted = go(settings, progress, stops, images=options.images)
        finally:
            stops.boot_has_ended()
    except ChutesError as exc:
        code = console.REFUSED if isinstance(exc, Refusal | DiskError) else console.USAGE
        error: ChutesError = exc
    except StoppedError as exc:
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
    _tell_failure(settings, progress, error, code)
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


# --- what is told ---


def _tell_done(options: argparse.Namespace, settings: AgentSettings, progress: Progress, booted: Booted) -> None:
    from chutes_proto.boot._handoff import LIFE

    fields: dict[str, Value] = {
        "vm_name": booted.grant.vm_name,
        "hotkey": booted.grant.miner_hotkey,
        "opened": [f"{it.name}: {it.device if options.images else it.path}" for it in booted.opened],
        "formatted": [volume.name for volume in booted.opened if volume.formatted],
    }
    if booted.grant.vm_auth_ss58 is not None:
        fields["vm_auth_ss58"] = booted.grant.vm_auth_ss58
    is_left = settings.volumes and not any(volume.name in settings.volumes for volume in booted.opened)
    lines = [("", f"DONE: VM {booted.grant.vm_name} is {'attested' if is_left else 'booted'}")]
    for volume in booted.opened:
        new = ", formatted just now: it needs a file system" if volume.formatted else ""
        opened = "its key fits" if options.images else f"open as {volume.path}"
        lines.append((volume.name, f"{volume.device}: {opened}{new}"))
    if is_left:
        fields["left"] = settings.state.file
        lines.append(("volumes", f"left to `chutes-proto agent resume`, within {LIFE // 60} minutes"))
    progress.finish("agent_done", fields, lines, failed=False)


def _tell_failure(settings: AgentSettings, progress: Progress, error: ChutesError, code: int) -> None:
    """Close what this run has opened, and say what has happened, what it means and what comes next."""
    from chutes_proto.boot._advice import advise
    from chutes_proto.cli.agent.progress import said
    from chutes_proto.errors import DiskError

    progress.close()  # who comes to the console of a failed boot finds no open disk
    stopped: Mapping[str, Value] = {} if isinstance(error, DiskError) else progress.stopped
    advice, ending, facts = advise(error), settings.on_failure, said(error, stopped)
    step = str(stopped.get("step", ""))
    where = f" at step {step}, at {progress.server()}" if step else ""
    lines = [("", f"BOOT FAILED{where}"), ("reason", facts["reason"])]
    if "status" in facts:
        lines.append(("code", f"{facts['code']} (status {facts['status']})"))
    if facts.get("request_id"):
        lines.append(("request", f"{facts['request_id']} (its operator runs: chutes-proto why {facts['request_id']})"))
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


def _foresee(options: argparse.Namespace, settings: AgentSettings) -> int:
    from chutes_proto.boot._disks import foresee
    from chutes_proto.io.agent import make_signer
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.quoters.choose import make_quoter

    who = identity_of(settings)
    check_places(settings, make=False)
    _ = make_signer(settings.signer, who)
    if not is_simulated(settings):  # to make one would make its platform
        _ = make_quoter(settings.quoter)
    if settings.ca_file is not None:
        from chutes_proto.io.http.tls import context_trusting

        _ = context_trusting(settings.ca_file)
    seen = Performer(disks=disks(images=options.images)).run(foresee(settings.root_disk, settings.disks))
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
        console.say(IMAGES)
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
        "provisioned": [action.as_dict() for action in forecast.provisioned],
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
    later = "two-phase or provisioned" if forecast.two_phase == forecast.provisioned else "provisioned"
    for action in forecast.provisioned[len(forecast.base) :]:
        console.say(f"  in the {later} exchange: {str(action).removeprefix(f'{name}: ')}")
