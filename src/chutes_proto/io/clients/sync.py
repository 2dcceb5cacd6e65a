"""The boot agent and a miner's client without an event loop.

No rule is here: the flows of ``chutes_proto.boot`` and ``chutes_proto.miner`` decide.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import TracebackType

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer, SigningPolicy
from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, Volumes
from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
from chutes_proto.boot._session import BootSession
from chutes_proto.io.drivers.sync import Performer, log_record
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import Quoter, check_quoter
from chutes_proto.log import Record
from chutes_proto.miner._flows import (
    MINER_RETRY,
    AttestationStatus,
    Miner,
    RuntimeAttestation,
    Server,
    attest_server,
    list_servers,
    read_server,
    read_status,
    register_server,
    remove_server,
    rename_server,
)
from chutes_proto.secret import Secret
from chutes_proto.wire.miners import NodeArgs


class BootAgent:
    """One VM's boot against one key server, without an event loop: a context manager.

    ``url`` is ``https://host:port``. ``hotkey`` is the SS58 address of the miner that owns the VM, ``vm_name`` its
    name. ``quoter`` makes a quote of 64 bytes of report data. ``ca_pem`` is the CA bundle to trust instead of the
    system's, ``signer`` proves the hotkey. The agent makes an ephemeral client key, which the quotes bind, or takes
    ``identity``. It uses no proxy that the environment names.

    The methods raise `Refused` or `BadRequest` at the first final answer, and, when attempts or time are used up, the
    last of `Unavailable`, `TransportError`, `RemoteProtocolError`, `QuoteUnavailable`.
    """

    def __init__(
        self,
        url: str,
        *,
        hotkey: str,
        vm_name: str,
        quoter: Quoter,
        ca_pem: bytes | None = None,
        signer: Signer | None = None,
        identity: ClientIdentity | None = None,
        retry: RetryPolicy = DEFAULT_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
    ) -> None:
        check_quoter(quoter)
        identity = presented(identity, None)
        self._session = BootSession(BootSettings(hotkey, vm_name, identity.spki_sha256, signer, retry))
        self._sender = HttpsSender(client_context(identity, ca_pem), url, limits)
        self._run = Performer(send=self._sender, quoter=quoter, log=log).run

    def __enter__(self) -> BootAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sender.close()

    def boot(self) -> BootGrant:
        """Attest until the server grants."""
        return self._run(self._session.boot())

    def sync(self, volumes: Volumes) -> VolumeKeys:
        """Return the keys of ``volumes``: each name, and whether its disk has a LUKS header.

        ``volumes`` is the whole set of the VM's volumes; the server retires the keys of all others. Boots first where
        there is no grant, or where its token has expired.
        """
        return self._run(self._session.sync(volumes))

    @contextmanager
    def rotate(self, volumes: Volumes) -> Generator[Rotation]:
        """The current and the next keys of ``volumes``, confirmed when the block ends as the caller reported.

        For profiles with the two-phase exchange. Boots first where there is no grant, or where its keys were handed
        out. A block that raises confirms nothing. What the confirmation raises comes out of the block, and then no key
        may be taken off a disk::

            with agent.rotate({"storage": True}) as rotation:
                ...  # open the disk with rotation.keys["storage"].current, add .next
                rotation.added("storage")
            ...  # take the other keys off the disk
        """
        rotation = self._run(self._session.begin_rotation(volumes))
        yield rotation
        _ = self._run(self._session.confirm(rotation))

    def cache_passphrase(self) -> Secret:
        """The passphrase of the server's first volume; boots first where there is no grant."""
        return self._run(self._session.cache_passphrase())


class MinerClient:
    """One miner's servers at one key server, without an event loop: a context manager.

    ``url`` is ``https://host:port``; ``hotkey`` is the SS58 address, and ``signer`` signs with it: `HotkeyPair.sign`,
    or a function that asks whatever holds the key. ``ca_pem`` is the CA bundle to trust instead of the system's.
    `attest` needs a ``quoter``, and proves the ephemeral client key that the client makes, or that of ``identity``.

    The methods raise `Refusal`, `TransportError`, and `RemoteProtocolError` for an answer that is not the protocol;
    `LocalProtocolError`, before anything is sent, for values that no request could carry.
    """

    def __init__(
        self,
        url: str,
        *,
        hotkey: str,
        signer: Signer,
        signatures: SigningPolicy = "compatible",
        quoter: Quoter | None = None,
        ca_pem: bytes | None = None,
        identity: ClientIdentity | None = None,
        retry: RetryPolicy = MINER_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
    ) -> None:
        if quoter is not None:
            check_quoter(quoter)
        self._miner = Miner(hotkey, signer, signatures, retry)
        self._identity = presented(identity, None)
        self._sender = HttpsSender(client_context(self._identity, ca_pem), url, limits)
        self._run = Performer(send=self._sender, quoter=quoter, log=log).run

    def __enter__(self) -> MinerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sender.close()

    def register(self, server_id: str, *, host: str, gpus: Sequence[NodeArgs], name: str | None = None) -> None:
        """Register a server; without ``name`` its id is its name."""
        self._run(register_server(self._miner, server_id=server_id, host=host, gpus=gpus, name=name))

    def servers(self) -> tuple[Server, ...]:
        """Return all servers, newest first."""
        return self._run(list_servers(self._miner))

    def server(self, server_id: str) -> Server:
        """Return one server."""
        return self._run(read_server(self._miner, server_id))

    def rename(self, server_id: str, name: str) -> Server:
        """Give a server another name; the keys of its VM stay where they are."""
        return self._run(rename_server(self._miner, server_id, name))

    def remove(self, name_or_id: str) -> str:
        """Remove a server and return its name. The keys of its VM are kept."""
        return self._run(remove_server(self._miner, name_or_id))

    def attest(self, server_id: str) -> RuntimeAttestation:
        """Attest a server at runtime, with a quote that binds this client's key. Raises `QuoteUnavailable`, too."""
        return self._run(attest_server(self._miner, server_id, self._identity.spki_sha256))

    def status(self, server_id: str) -> AttestationStatus:
        """Return the newest verdict on a runtime quote, and whether it still counts."""
        return self._run(read_status(self._miner, server_id))
