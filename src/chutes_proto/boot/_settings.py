"""The boot agent's settings in TOML, and the VM's identity, which a config volume may provide.

Rules kept here:

* the file is measured with the image, and alone decides on servers, certificates, quoter, disks and what follows a
  failure; an unknown key is an error;
* a config volume is the host's, and untrusted: it provides at most the identity that the VM claims and the seed that
  signs, in files of bounded size whose content is checked before use; it does not override the settings;
* nothing here reads a file; no error repeats what is in one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias, cast

from attrs import evolve, field, frozen

from chutes_proto._converter import ProblemsError, StrictConverter
from chutes_proto.auth.hotkey import Hotkey, HotkeyError, secret_from_hex, wallet_secret
from chutes_proto.boot._quoter_names import COMMAND, cut_command, parse_quoter
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.errors import ConfigurationError, LocalProtocolError
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret
from chutes_proto.wire import json
from chutes_proto.wire.names import NAME_PATTERN, NAME_RULE, ROOT
from chutes_proto.wire.origin import Origin

MAX_SERVERS: Final = 16
MAX_CONFIG_FILE: Final = 4096
"""Bytes that a file of a config volume may have."""

Action: TypeAlias = Literal["exit", "reboot", "poweroff", "shell"]
Place: TypeAlias = Literal["run", "resume"]

CONFIG_VOLUME_SIGNER: Final = "config-volume"
_PLACE = re.compile(r"/[^\0]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")

_RESERVED = frozenset({ROOT, "k3s"})
_DAY: Final = 86_400


@frozen
class ConfigVolume:
    """The directory where the host's volume is mounted, and the names of its files, as deployed images have them.

    ``hotkey`` holds an SS58 address, or is a wallet's JSON (``ss58Address``; ``privateKey`` or ``secretSeed``).
    ``private_key`` holds 64 bytes in hex, ``seed`` 32; they are read only for the signer ``config-volume``, and one is
    enough.
    """

    directory: str | None = None
    hostname: str = "hostname"
    hotkey: str = "miner-ss58"
    private_key: str = "miner-private-key"
    seed: str = "miner-seed"


@frozen
class RootDisk:
    """The disk that the root passphrase opens, as ``/dev/mapper/{mapping}``; it is never formatted."""

    device: str | None = None
    mapping: str = "root"


@frozen
class VolumeDisk:
    """A volume's disk, mapped as ``/dev/mapper/{mapping}``, or by the volume's name where none is said."""

    device: str
    mapping: str | None = None


@frozen
class RetryOptions:
    """The retries of the agent; the waits between them are those of `RetryPolicy`.

    ``deadline_seconds`` count from the agent's start. Waits, requests, quotes and signatures end with them, but those
    that begin near the end, or after it, have a few seconds. Work on a disk is completed: no program is killed during a
    format or a change of keys before it has had the time that those take.
    """

    attempts: int = 30
    base_seconds: float = 1.0
    cap_seconds: float = 30.0
    deadline_seconds: float = 300.0


@frozen
class StateOptions:
    """Files for programs that run after the agent, on a file system in memory unless ``on_disk`` permits another.

    ``file`` is the key hand-off from ``run`` to ``resume``. The two-phase exchange also provides a key that no disk
    needs, 32 bytes in base64, the same at every boot; it is written to ``k3s_key_file`` if that is named.
    """

    file: str = "/run/chutes-proto/boot.json"
    k3s_key_file: str | None = None
    on_disk: bool = False


@frozen
class FailureOptions:
    """The action after a failed boot, the wait before it, in which the console can be read, and its commands."""

    action: Action = "exit"
    wait_seconds: float = 30.0
    reboot: tuple[str, ...] = ("reboot", "-f")
    poweroff: tuple[str, ...] = ("poweroff", "-f")
    shell: tuple[str, ...] = ("/bin/sh",)

    @property
    def command(self) -> tuple[str, ...]:
        """The command of the action; empty for exit."""
        return {"exit": (), "reboot": self.reboot, "poweroff": self.poweroff, "shell": self.shell}[self.action]


@frozen
class AgentSettings:
    """One settings file, checked as far as possible without the machine.

    ``servers`` are origins of servers that share one store. With a ``signer`` the VM proves its hotkey, as the
    provisioned exchange demands. ``volumes_at`` says which command opens the volumes: with
    "resume", ``run`` opens the root disk only. ``disk_wait_seconds`` is how long disks may take to appear.
    """

    servers: tuple[str, ...]
    ca_file: str | None = None
    quoter: str = "auto"
    hotkey: str | None = None
    vm_name: str | None = None
    signer: str | None = None
    volumes_at: Place = "run"
    disk_wait_seconds: float = 10.0
    config_volume: ConfigVolume = field(factory=ConfigVolume)
    root: RootDisk = field(factory=RootDisk)
    volumes: Mapping[str, VolumeDisk] = field(factory=dict[str, VolumeDisk])
    retry: RetryOptions = field(factory=RetryOptions)
    state: StateOptions = field(factory=StateOptions)
    on_failure: FailureOptions = field(factory=FailureOptions)

    @property
    def policy(self) -> RetryPolicy:
        """The `retry` options as a policy for all servers. Raises `LocalProtocolError`."""
        retry = self.retry
        seconds = (retry.base_seconds, retry.cap_seconds, retry.deadline_seconds)
        return RetryPolicy(retry.attempts, *seconds, servers=len(self.servers))

    @property
    def root_disk(self) -> Volume | None:
        """The root disk as a volume."""
        device = self.root.device
        return None if device is None else Volume(ROOT, device, self.root.mapping)

    @property
    def disks(self) -> tuple[Volume, ...]:
        """The volumes with their disks, in the file's order."""
        return tuple(Volume(name, disk.device, disk.mapping or "") for name, disk in self.volumes.items())

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of the files that are read from the config volume."""
        volume = self.config_volume
        return tuple(
            name
            for name, wanted in (
                (volume.hostname, self.vm_name is None),
                (volume.hotkey, self.hotkey is None),
                (volume.private_key, self.signer == CONFIG_VOLUME_SIGNER),
                (volume.seed, self.signer == CONFIG_VOLUME_SIGNER),
            )
            if wanted
        )

    @classmethod
    def from_toml(cls, data: bytes) -> AgentSettings:
        """Read the settings from ``data``. Raises `ConfigurationError`, which lists all problems."""
        try:
            settings = _CONVERTER.from_toml(data, cls, _problems)
        except ProblemsError as exc:
            raise ConfigurationError(str(exc)) from None
        return evolve(settings, servers=tuple(server.removesuffix("/") for server in settings.servers))


def _problems(settings: AgentSettings) -> list[str]:
    found = [*_server_problems(settings.servers), *_identity_problems(settings), *_disk_problems(settings)]
    found += _quoter_problems(settings.quoter)
    names = ("attempts", "base_seconds", "cap_seconds", "deadline_seconds")
    found += [f"retry.{name}: at most {_DAY}" for name in names if getattr(settings.retry, name) > _DAY]
    try:
        _ = settings.policy
    except LocalProtocolError:
        found.append("retry: attempts at least 1, 0 < base_seconds <= cap_seconds, and deadline_seconds above 0")
    if not 0 <= settings.disk_wait_seconds <= _DAY:
        found.append(f"disk_wait_seconds: 0 to {_DAY}")
    failure = settings.on_failure
    if not 0 <= failure.wait_seconds <= _DAY:
        found.append(f"on_failure.wait_seconds: 0 to {_DAY}")
    if failure.action != "exit" and not "".join(failure.command[:1]):
        found.append(f"on_failure.{failure.action}: name the program and its arguments")
    state = settings.state
    paths = {"ca_file": settings.ca_file, "state.file": state.file, "state.k3s_key_file": state.k3s_key_file}
    wrong = [name for name, path in paths.items() if path is not None and path[:1] != "/"]
    found += [f"{name}: say the whole path, from / on" for name in wrong]
    if settings.volumes_at == "resume" and not settings.volumes:
        found.append('volumes_at: "resume" has nothing to do without volumes')
    return found


def _server_problems(servers: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    if not 1 <= len(servers) <= MAX_SERVERS:
        found.append(f"servers: name 1 to {MAX_SERVERS}")
    origins: list[Origin] = []
    for index, server in enumerate(servers):
        try:
            origins.append(Origin.parse(server))
        except LocalProtocolError as exc:
            found.append(f"servers.{index}: {exc}")
    if len({*origins}) != len(origins):
        found.append("servers: a server is given twice")
    return found


def _identity_problems(settings: AgentSettings) -> list[str]:
    found: list[str] = []
    volume = settings.config_volume
    if settings.asked and volume.directory is None:
        found.append("config_volume.directory: name it, or say vm_name and hotkey here")
    if volume.directory is not None and not volume.directory.startswith("/"):
        found.append("config_volume.directory: say the whole path, from / on")
    wrong = [
        name
        for name in ("hostname", "hotkey", "private_key", "seed")
        if not _FILE_NAME.fullmatch(getattr(volume, name))
    ]
    found += [f"config_volume.{name}: the name of a file in the config volume, without a path" for name in wrong]
    if settings.vm_name is not None and not re.fullmatch(NAME_PATTERN, settings.vm_name, re.ASCII):
        found.append(f"vm_name: a VM's name is {NAME_RULE}")
    if settings.hotkey is not None:
        try:
            _ = Hotkey.parse(settings.hotkey)
        except HotkeyError as exc:
            found.append(f"hotkey: {exc}")
    if settings.signer not in (None, CONFIG_VOLUME_SIGNER):
        found += _command_problems("signer", settings.signer, f'"{CONFIG_VOLUME_SIGNER}"')
    return found


def _quoter_problems(text: str) -> list[str]:
    try:
        kind, rest = parse_quoter(text)
    except ConfigurationError as exc:
        return [str(exc)]
    if kind == "command":  # a program has its kind before it here: what makes an image copies that
        return _command_problems("quoter", text, '"auto", "tsm", "tsm:DIR", "vsock", "vsock:CID:PORT", "unix:PATH"')
    if kind != "vsock" and rest and not _PLACE.fullmatch(rest):
        return [f"quoter: {kind} is followed by a whole path, from / on"]
    return []


def _command_problems(key: str, text: str, others: str) -> list[str]:
    try:
        if text.startswith(COMMAND):
            _ = cut_command(text.removeprefix(COMMAND))
            return []
        why = ""
    except ConfigurationError as exc:
        why = f"; {exc}"
    return [f'{key}: say {others} or "{COMMAND}PROGRAM ARGUMENTS"{why}']


def _disk_problems(settings: AgentSettings) -> list[str]:
    found: list[str] = []
    disks: list[Volume] = []
    tables = [(f"volumes.{name}", name, disk.device, disk.mapping) for name, disk in settings.volumes.items()]
    if settings.root.device is not None:
        tables.append((ROOT, ROOT, settings.root.device, settings.root.mapping))
    if not tables:
        found.append('volumes: name at least one disk, for example [volumes.storage] with device = "/dev/vdb"')
    for where, name, device, mapping in tables:
        try:
            disks.append(Volume(name, device, mapping or ""))
        except LocalProtocolError as exc:
            found.append(f"{where}: {exc}")
    found += [f"volumes.{name}: a reserved name" for name in sorted(_RESERVED & settings.volumes.keys())]
    twice = [kind for kind in ("device", "mapping") if len({getattr(disk, kind) for disk in disks}) != len(disks)]
    return found + [f"volumes: a {kind} is given twice" for kind in twice]


# --- the VM's identity ---


@frozen
class VmIdentity:
    """The identity that the VM claims: untrusted, the server decides.

    ``secret`` is the hotkey's seed or private key, if it was provided.
    """

    vm_name: str
    hotkey: Hotkey
    secret: Secret | None = None


def vm_identity(settings: AgentSettings, files: Mapping[str, bytes]) -> VmIdentity:
    """Find the VM's identity in the settings and the files (`AgentSettings.asked`) of the config volume.

    Raises `ConfigurationError`, which names the file and repeats nothing of it.
    """
    volume = settings.config_volume
    name = settings.vm_name
    if name is None:
        name = _text(volume.hostname, files)
        if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
            raise _wrong(volume.hostname, f"a VM's name is {NAME_RULE}")
    address, text = settings.hotkey, None
    if address is None:
        address, text = _hotkey(_text(volume.hotkey, files))
    try:
        hotkey = Hotkey.parse(address)
    except HotkeyError as exc:
        raise _wrong(volume.hotkey, f"not a hotkey: {exc}") from None
    if settings.signer != CONFIG_VOLUME_SIGNER:
        return VmIdentity(name, hotkey)
    file = volume.hotkey
    if text is None:
        file = volume.private_key if volume.private_key in files else volume.seed
        text = _text(file, files)
    try:
        return VmIdentity(name, hotkey, secret_from_hex(text))
    except HotkeyError as exc:
        raise _wrong(file, str(exc)) from None


def _hotkey(text: str) -> tuple[str, str | None]:
    """Return the address and the text of the secret; a text that is not a wallet's JSON is an address."""
    if not text.startswith("{"):
        return text, None
    try:
        content = json.decode(text.encode())
    except json.JsonError:
        content = None
    members = cast("dict[str, object]", content) if isinstance(content, dict) else {}
    address = members.get("ss58Address")
    return address if isinstance(address, str) else "", wallet_secret(members)


def _text(name: str, files: Mapping[str, bytes]) -> str:
    data = files.get(name)
    if data is None:
        raise _wrong(name, "the file is missing")
    if len(data) > MAX_CONFIG_FILE:
        raise _wrong(name, f"the file has more than {MAX_CONFIG_FILE} bytes")
    try:
        return data.decode("ascii").strip("\r\n\t ")
    except UnicodeDecodeError:
        raise _wrong(name, "the file is not ASCII text") from None


def _wrong(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"config volume: {name}: {what}")


_CONVERTER: Final = StrictConverter(own_file=True)
