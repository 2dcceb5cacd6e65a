"""The files of a new key server: a configuration that works, a KEK, a TLS key with its certificate request, a template.

Rules kept here:

* nothing is replaced: a KEK that is overwritten costs every disk;
* secrets are made with mode 0600, before anything is written into them.
"""

from __future__ import annotations

import json
import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import make_directory, write_file

_PCS: Final = "https://api.trustedservices.intel.com/sgx/certification/v4"
_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"

_SERVER: Final = """\
# A key server. All keys and their defaults: examples/server.toml, docs/reference/configuration.md.
# Relative paths begin at the directory of this file.

# VMs connect here.
listen = "0.0.0.0:8443"

# server.csr asks your CA for the certificate; save what it returns as server.pem, leaf first.
tls = {{ certificate = "server.pem", key = "server.key" }}

# The keys of all disks. For several servers: "postgresql://user@host/database".
# The mark is what this server last saw of the store. One that went back is noticed, and told again who was revoked.
store = {{ url = "sqlite:{state}keys.db", mark_file = "{state}store.mark" }}

# Opens every key in the store. Keep a copy in another place: if it is lost, every disk is lost.
kek_file = "kek"

# The reference values of your VM images.
measurements = ["measurements.toml"]

# The hotkeys that are served; "*" is any.
hotkeys = "*"

# `chutes-proto reload` asks here to read these files again, without a restart.
control = "{state}control.sock"

# Intel's statements about platforms, fetched when they are needed and kept for the next start.
[collateral]
cache = "{state}collateral"
upstreams = [
  {{ url = "{pcs}", root_ca_crl = "{crl}" }},
]

# State and metrics, for this machine only.
[admin]
listen = "127.0.0.1:9464"

[limits]
requests_per_minute = 600

# "vm": the VM draws the passphrase of its root disk from this server. "image": the image has it.
[profile_defaults]
root_passphrase = "vm"
"""

_MEASUREMENTS: Final = """\
# The reference values of a VM image. Take a quote at boot and one at runtime, from a machine that you trust, and let
#   chutes-proto profile boot.quote runtime.quote --name 8xh200 --version 1.0 > measurements.toml
# write this file. Each value is 96 hex digits. Without a profile no VM is served.
#
# [[profile]]
# name = "8xh200"
# version = "1.0"
# mrtd = "..."
# boot = { rtmr0 = "...", rtmr1 = "...", rtmr2 = "...", rtmr3 = "..." }
# runtime = { rtmr0 = "...", rtmr1 = "...", rtmr2 = "...", rtmr3 = "..." }
"""


_HOST: Final = re.compile(r"[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


@frozen
class Made:
    """One file that was written, and its purpose."""

    path: Path
    purpose: str


def write_initial(directory: Path, name: str, state: Path | None = None) -> list[Made]:
    """Write the files of a server that VMs reach under ``name``, a host name or an IP address.

    ``state`` is the directory of store and cache, by default the same. Raises `ConfigurationError` if one of the files
    exists, and writes nothing then; `FileUnavailable`.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # A string of TOML has the escapes of JSON, and needs one more, for DEL.
    prefix = "" if state is None else json.dumps(f"{state}/", ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
    try:
        configuration = _SERVER.format(state=prefix, pcs=_PCS, crl=_CRL).encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"--state: {str(state)!r} is not UTF-8, as a configuration is; name another") from None
    files = {
        "server.toml": (configuration, 0o600, "the configuration"),
        "kek": (os.urandom(32), 0o600, "the key-encryption key: store a copy in another place"),
        "server.key": (key_pem, 0o600, "the TLS key"),
        "server.csr": (_request(key, name), 0o644, "the request that your CA signs; save its answer as server.pem"),
        "measurements.toml": (_MEASUREMENTS.encode(), 0o644, "a template of reference values, to be filled"),
    }
    if found := sorted(file for file in files if os.path.lexists(directory / file)):
        raise ConfigurationError(f"{directory / found[0]}: exists, and is not replaced; name another directory")
    _ = make_directory(directory, mode=0o700)
    for file, (data, mode, _) in files.items():
        write_file(directory / file, data, mode=mode)
    return [Made(directory / file, purpose) for file, (_, _, purpose) in files.items()]


def _request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    try:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternative = x509.SubjectAlternativeName([_general_name(name)])
    except ValueError:
        raise ConfigurationError(f"--name: {name!r} is neither a host name nor an IP address") from None
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(alternative, critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name):
            raise
        return x509.DNSName(name)
