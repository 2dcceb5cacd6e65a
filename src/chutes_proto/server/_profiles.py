"""The server's options for each measurement profile, and the published reference values (operation 15).

These keys are set in the profile's table, or in the configuration's ``[profile_defaults]``. ``root_passphrase`` has no
default: a wrong guess could lose a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias, cast

import attrs
from attrs import frozen

from chutes_proto._converter import ProblemsError, StrictConverter
from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._measurements import Profile, Rtmrs
from chutes_proto.secret import Secret
from chutes_proto.server._gpu_evidence import Demand
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_answer
from chutes_proto.wire.public import MEASUREMENTS, EncodedMeasurements, Measurements, MeasurementsAnswer, Registers

ServedExchange: TypeAlias = Literal["base", "two-phase", "provisioned"]
"""The exchange that an image speaks; ``provisioned`` is that of images from 1.4.0 on."""


@frozen
class ServedOptions:
    """The server's keys of one profile, as in its file."""

    root_passphrase: Literal["image", "vm"]
    root_passphrase_file: str | None = None
    root_passphrases_file: str | None = None
    exchange: ServedExchange = "base"
    require_hotkey_signature: bool = False
    token_needs_certificate: bool = False
    rc: bool = False
    authorized_hotkeys: tuple[str, ...] = ()
    gpu_evidence: Demand = "record"


EXTRA_KEYS = frozenset(attrs.fields_dict(ServedOptions))
"""The keys of `ServedOptions`, for the parser of measurement profiles."""


@frozen
class ServedProfile:
    """One profile with its options. ``image_passphrase`` is set exactly when all its VMs share one."""

    measurements: Profile
    image_passphrase: Secret | None
    require_hotkey_signature: bool
    token_needs_certificate: bool
    exchange: ServedExchange = "base"
    rc: bool = False
    authorized_hotkeys: frozenset[str] = frozenset()
    gpu_evidence: Demand = "record"


def serve_profile(
    profile: Profile, extras: Mapping[str, object], defaults: Mapping[str, object], read: Callable[[str], bytes]
) -> ServedProfile:
    """Join a profile with its options; ``read`` reads a passphrase file. Raises `ConfigurationError`."""
    named = f"profile {profile.name!r}"
    if profile.rules:
        raise ConfigurationError(f"{named}: a server publishes all registers, so each must have a value")
    try:
        options = _CONVERTER.structure({**defaults, **extras}, ServedOptions)
    except ProblemsError as exc:
        raise ConfigurationError(f"{named}: {exc}") from None
    passphrase = None
    if options.root_passphrase == "image":
        passphrase = _passphrase_of(named, profile.version, options, read)
    elif found := sorted(extras.keys() & {"root_passphrase_file", "root_passphrases_file"}):
        raise ConfigurationError(f'{named}: root_passphrase = "vm" makes its own; remove {found[0]}')
    if options.authorized_hotkeys and not options.rc:
        raise ConfigurationError(f"{named}: authorized_hotkeys goes with rc = true")
    return ServedProfile(
        profile,
        passphrase,
        options.require_hotkey_signature,
        options.token_needs_certificate,
        options.exchange,
        options.rc,
        frozenset(options.authorized_hotkeys),
        options.gpu_evidence,
    )


def option_defaults(defaults: Mapping[str, object]) -> dict[str, object]:
    """The keys of `ServedOptions` in ``[profile_defaults]``. Raises `ConfigurationError` for a wrong value."""
    options = {key: value for key, value in defaults.items() if key in EXTRA_KEYS}
    try:
        _ = _CONVERTER.structure({"root_passphrase": "vm", **options}, ServedOptions)
    except ProblemsError as exc:
        raise ConfigurationError("; ".join(f"profile_defaults.{problem}" for problem in exc.problems)) from None
    return options


def check_signing_keys(data: bytes) -> bytes:
    """Check the form of a bundle of signing keys; returns it in compact JSON. Raises `ValueError`."""
    match content := json.decode(data):
        case {"version": int(), "keys": {**keys}, "signatures": {**signatures}} if keys.keys() == signatures.keys():
            if len(content) == 3 and all(isinstance(text, str) for text in (*keys.values(), *signatures.values())):
                return json.encode(content)
        case _:
            pass
    raise ValueError('not {"version": 1, "keys": {…}, "signatures": {…}} with a signature in base64 for each key')


def publish(profiles: Iterable[Profile]) -> EncodedMeasurements:
    """Make the answer of operation 15, once: anyone may ask for it, and it can be long."""
    answer = MeasurementsAnswer(profiles=tuple(map(_published, profiles)))
    return EncodedMeasurements(profiles=encode_answer(MEASUREMENTS, answer).body)


def _published(profile: Profile) -> Measurements:
    return Measurements(
        version=profile.version,
        name=profile.name,
        mrtd=profile.mrtd.hex().upper(),
        boot_rtmrs=_registers(profile.boot),
        runtime_rtmrs=_registers(profile.runtime),
        expected_gpus=profile.expected_gpus,
        gpu_count=profile.gpu_count,
        fingerprint=profile.fingerprints[0].hex() if profile.fingerprints else None,
    )


def _registers(rtmrs: Rtmrs) -> Registers:
    return Registers(**{f"RTMR{number}": register.hex().upper() for number, register in enumerate(rtmrs)})


def _passphrase_of(named: str, version: str, options: ServedOptions, read: Callable[[str], bytes]) -> Secret:
    """The passphrase of the build that ``version`` is, from the file of one or of all. Raises `ConfigurationError`."""
    one, every = options.root_passphrase_file, options.root_passphrases_file
    if one is not None and every is None:
        return _image_passphrase(f"{named}: root_passphrase_file", read(one))
    if one is not None or every is None:
        keys = "root_passphrase_file or root_passphrases_file"
        raise ConfigurationError(f'{named}: root_passphrase = "image" needs {keys}, one of them')
    try:
        passphrases = json.decode(read(every))
    except json.JsonError:
        passphrases = None
    if not isinstance(passphrases, dict):
        raise ConfigurationError(f"{named}: root_passphrases_file must hold a JSON object, version to passphrase")
    passphrase: object = cast("dict[str, object]", passphrases).get(version)
    if not isinstance(passphrase, str):
        raise ConfigurationError(f"{named}: root_passphrases_file has no passphrase of version {version!r}")
    return _image_passphrase(f"{named}: root_passphrases_file, version {version!r}:", passphrase.encode())


def _image_passphrase(named: str, data: bytes) -> Secret:
    """The file's text without one final line end. Deployed clients cut it out of JSON, so it must need no escape."""
    value = data.removesuffix(b"\n").removesuffix(b"\r")
    if not value or any(not 0x20 <= byte <= 0x7E or byte in b'"\\' for byte in value):
        raise ConfigurationError(f'{named} must hold one line of printable ASCII without " and \\, and not be empty')
    return Secret(value)


_CONVERTER = StrictConverter(own_file=True)
