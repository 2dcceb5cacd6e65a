"""A miner's client without an event loop: the flows of ``chutes_proto.miner`` decide everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer, SigningPolicy
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.io.clients.connected_sync import Connected
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.quoters.choose import GpuTool, Quoter
from chutes_proto.log import Record
from chutes_proto.miner import _flows as flows
from chutes_proto.miner._flows import MINER_RETRY, AttestationStatus, Gpu, Miner, RuntimeAttestation, Server


class MinerClient(Connected):
    """One miner's servers at one key server, without an event loop: a context manager.

    ``url`` is ``https://host:port``. ``hotkey`` is the SS58 address, and ``signer`` signs with it: `HotkeyPair.sign`
    (see `read_hotkey`), or a function that asks the program or device with the key. With ``signatures="request"`` each
    signature covers the whole request. ``ca_pem`` is the CA bundle to trust instead of the system's. `attest` needs a
    ``quoter``; its quote binds the ephemeral client key that the client makes, or that of ``identity``. With a
    ``gpu_tool`` it sends evidence of the machine's GPUs, too. ``retry``
    limits each method, ``limits`` each request; ``log`` is called with every record, none of which holds a secret.

    The methods raise `Refusal`, `TransportError`, `RemoteProtocolError` for an answer that breaks the protocol, and,
    before anything is sent, `LocalProtocolError` for values that no request can carry, and after the block has ended.
    """

    def __init__(
        self,
        url: str,
        *,
        hotkey: str,
        signer: Signer,
        signatures: SigningPolicy = "compatible",
        quoter: Quoter | None = None,
        gpu_tool: GpuTool | None = None,
        ca_pem: bytes | None = None,
        identity: ClientIdentity | None = None,
        retry: RetryPolicy = MINER_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
    ) -> None:
        self._miner = Miner(hotkey, signer, signatures, retry)
        self._with_gpus = gpu_tool is not None
        super().__init__(url, identity, ca_pem, limits, quoter, log, gpu_tool)

    def register(self, server_id: str, *, host: str, gpus: Sequence[Gpu], name: str | None = None) -> None:
        """Register a server at ``host``, a name or address; without ``name`` its id is its name."""
        self._run(flows.register_server(self._miner, server_id=server_id, host=host, gpus=gpus, name=name))

    def servers(self) -> tuple[Server, ...]:
        """Return all servers of the hotkey, newest first."""
        return self._run(flows.list_servers(self._miner))

    def server(self, server_id: str) -> Server:
        """Return the server with this id."""
        return self._run(flows.read_server(self._miner, server_id))

    def rename(self, server_id: str, name: str) -> Server:
        """Give a server another name; the keys of its VM stay where they are."""
        return self._run(flows.rename_server(self._miner, server_id, name))

    def remove(self, name_or_id: str) -> str:
        """Remove a server and return its name; the keys of its VM are kept."""
        return self._run(flows.remove_server(self._miner, name_or_id))

    def attest(self, server_id: str) -> RuntimeAttestation:
        """Attest a server at runtime, with a quote that binds this client's key; may also raise `QuoteUnavailable`."""
        return self._run(
            flows.attest_server(self._miner, server_id, self._identity.spki_sha256, with_gpus=self._with_gpus)
        )

    def status(self, server_id: str) -> AttestationStatus:
        """Return the newest verdict on a runtime quote, and whether it is still valid."""
        return self._run(flows.read_status(self._miner, server_id))
