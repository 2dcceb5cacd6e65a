"""Counts, times and states of a server for Prometheus.

Rules kept here:

* every label comes from a closed list, or from the operator's configuration: nobody who sends requests can make a new
  series, and no label has a VM's name, an address or a secret;
* times are seconds of a monotonic clock.

Source of names and units: Prometheus, "Metric and label naming".
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector

from chutes_proto import __version__, effects
from chutes_proto.effects import Effect, Flow
from chutes_proto.errors import CollateralUnavailable, Refusal, StoreBusy, StoreError
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.server.health import Counts, Health
from chutes_proto.io.server.scrub import Scrubbed
from chutes_proto.io.server.sinks import KINDS
from chutes_proto.io.server.workers import METRICS_DIRECTORY
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.server._observing import Answered
from chutes_proto.server._service import Service
from chutes_proto.store._run import Unit, unit_name
from chutes_proto.store._sealing import SEALED
from chutes_proto.wire.endpoints import COMMON_CODES
from chutes_proto.wire.vms import BOOT_ATTESTATION

T = TypeVar("T")

_PREFIX: Final = "chutes_proto"
_REQUEST_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
_SUMMED: Final = frozenset("connections store_waits verifications verifications_limit host_calls open_boots".split())
"""The gauges that are of one worker each; the others are the same in all."""
TABLES: Final = (*(kind.TABLE for kind in SEALED), "audit", "fact", "head", "store_head")
"""The tables of which a row may be found that is not authentic."""
_STEP_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 20.0)


disable_created_metrics()  # type: ignore[no-untyped-call] # they double the number of series


class Metrics:
    """The metrics of one server process, and its `Observer`.

    The ``worker`` of a number goes on with the files of the one that had it before: counts never fall, and a worker
    that ends again and again leaves nothing behind.
    """

    def __init__(self, worker: int | None = None) -> None:
        if worker is not None and METRICS_DIRECTORY in os.environ:
            values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]
        self.registry: CollectorRegistry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that were answered.", "operation", "status", "code")
        self._seconds = self._histogram(
            "request_seconds", "From the first byte of a request to its answer.", _REQUEST_BUCKETS, "operation"
        )
        self._steps = self._histogram("step_seconds", "Parts of the work on a request.", _STEP_BUCKETS, "step")
        self._transactions = self._counter("transactions", "Transactions of the store.", "unit", "result")
        self._collateral = self._counter("collateral_lookups", "Collateral for a quote.", "result")
        self._handshakes = self._counter("tls_handshakes", "TLS handshakes of clients.", "result")
        self._rollbacks = self._counter("rollbacks", "Transactions that ran again because of others.", "unit")
        self._rollbacks_seen: dict[str, int] = {}
        self._forged = self._counter("rows_not_authentic", "Rows that were refused as not authentic.", "table")
        self._forged_seen: dict[str, int] = {}
        self._not_copied = self._counter("audit_not_copied", "Lines that a sink of the audit log did not take.", "sink")
        self._not_copied_seen: dict[str, int] = {}
        # From the start: Prometheus does not see the first count of a series that begins with it.
        for sink in KINDS:
            _ = self._not_copied.labels(sink)
        for table in TABLES:
            _ = self._forged.labels(table)
        for code in (*BOOT_ATTESTATION.codes, *COMMON_CODES):
            _ = self._requests.labels(BOOT_ATTESTATION.operation, str(code.status), code)
        self._store_waits = self._gauge("store_waits", "Requests of boots that wait for the store, or use it, now.")
        self._connections = self._gauge("connections", "Open connections.")
        self._verifications = self._gauge("verifications", "Quotes that wait for collateral now.")
        self._most = self._gauge("verifications_limit", "The most quotes at a time (limits.verifications).")
        self._hosts = self._gauge("host_calls", "Hosts that are asked for evidence now.")
        self._open_boots = self._gauge("open_boots", "Boots that were granted here and are not complete.")
        self._draining = self._gauge("draining", "1 once the server was told to stop.")
        self._checks = self._gauge("check", "State of a check: 0 ok, 1 a note, 2 a problem.", "check")
        self._expires = self._gauge("collateral_expires_timestamp_seconds", "End of collateral.", "family")
        self._issued = self._gauge("collateral_issued_timestamp_seconds", "Begin of collateral.", "family")
        self._certificate = self._gauge("certificate_expires_timestamp_seconds", "End of the TLS certificate.")
        self._profiles = self._gauge("profile_ends_timestamp_seconds", "End of a profile's schedule.", "profile")
        self._kek = self._gauge("kek_created_timestamp_seconds", "The time of the file of kek_file.", "kek")
        self._gpus = self._gauge(
            "gpu_collateral_expires_timestamp_seconds", "The first end of RIM signers, and of OCSP answers.", "kind"
        )
        self._skew = self._gauge("clock_skew_seconds", "This machine's clock minus the database's.")
        self._read_at = self._gauge("checks_timestamp_seconds", "The time of the last look at the checks.")
        self._keys = self._gauge("keys", "Generations of keys in the store.", "state")
        self._sealed = self._gauge("sealed_keys", "Passphrases in the store, by the key-encryption key.", "kek")
        self._labels_seen: dict[Gauge, set[str]] = {}
        self._audit = self._gauge("audit_position", "The number of the newest audit row.")
        self._waits = self._gauge("audit_waiting_seconds", "For how long audit rows have waited for the log.")
        self._scrubbed_at = self._gauge("scrub_timestamp_seconds", "The end of the last whole scrub of the store.")
        self._scrub_rows = self._gauge("scrub_rows", "Rows that it read.")
        self._scrub_findings = self._gauge("scrub_findings", "Faults that it found.")
        self._gauge("build_info", "The version of the server.", "version").labels(__version__).set(1)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, summed over the workers of this server."""
        if METRICS_DIRECTORY not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        _ = MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    content_type: str = CONTENT_TYPE_PLAIN_0_0_4

    # --- what happens ---

    def __call__(self, answered: Answered) -> None:
        """Count a request; see `Observer`."""
        self._requests.labels(answered.operation, str(answered.status), answered.code).inc()
        self._seconds.labels(answered.operation).observe(answered.seconds)

    def handshake(self, *, done: bool) -> None:
        """Count a connection whose TLS handshake was completed, or was not."""
        self._handshakes.labels("done" if done else "failed").inc()

    def step(self, name: str, seconds: float) -> None:
        """Note the duration of a step."""
        self._steps.labels(name).observe(seconds)

    def transaction(self, unit: Unit[Any], error: BaseException | None) -> None:
        """Count a transaction that ended, with ``error`` if it raised."""
        match error:
            case None:
                result = "committed"
            case Refusal():
                result = "refused"
            case StoreBusy():
                result = "busy"
            case StoreError():
                result = "failed"
            case _:
                result = "defect"
        self._transactions.labels(unit_name(unit), result).inc()

    def collateral(self, error: BaseException | None) -> None:
        """Count a look for collateral."""
        result = "found" if error is None else "unavailable" if isinstance(error, CollateralUnavailable) else "defect"
        self._collateral.labels(result).inc()

    # --- what is ---

    def look(self, service: Service, store: DurableStore, connections: int, *, draining: bool) -> None:
        """Set the gauges of this process."""
        self._store_waits.set(service.attested.admitted + service.strangers.admitted)
        for unit, count in store.rollbacks.copy().items():
            self._rollbacks.labels(unit).inc(count - self._rollbacks_seen.get(unit, 0))
            self._rollbacks_seen[unit] = count
        for table, count in store.custody.faults.copy().items():
            self._forged.labels(table).inc(count - self._forged_seen.get(table, 0))
            self._forged_seen[table] = count
        for sink, count in store.copies.missed.copy().items():
            self._not_copied.labels(sink).inc(count - self._not_copied_seen.get(sink, 0))
            self._not_copied_seen[sink] = count
        self._waits.set(store.audit_waits)
        self._connections.set(connections)
        self._verifications.set(service.verifications.admitted)
        self._most.set(service.verifications.size)
        self._hosts.set(service.hosts.admitted)
        self._open_boots.set(len(service.boots))
        self._draining.set(draining)

    def scrubbed(self, last: Scrubbed) -> None:
        """Set the gauges of the last whole scrub."""
        self._scrubbed_at.set(last.at)
        self._scrub_rows.set(last.rows)
        self._scrub_findings.set(last.findings)

    def show(self, health: Health) -> None:
        """Set the gauges of the checks."""
        self._read_at.set(health.at)
        for finding in health.findings:
            self._checks.labels(finding.what).set({"ok": 0, "note": 1, "problem": 2}[finding.state])
        if health.clock_skew is not None:
            self._skew.set(health.clock_skew)
        labelled = (self._expires, self._issued, self._profiles, self._kek, self._gpus)
        ends: dict[Gauge, dict[str, float]] = {gauge: {} for gauge in labelled}
        for each in reversed(health.ends):  # of several of one label, the first to end stays
            match each.kind:
                case "certificate":
                    self._certificate.set(each.end)
                case "collateral":
                    ends[self._issued][each.name] = each.begin or 0
                    ends[self._expires][each.name] = each.end
                case "profile":
                    ends[self._profiles][each.name] = each.end
                case "kek":
                    ends[self._kek][each.name] = each.begin or 0
                case "gpu_rim" | "gpu_status":
                    ends[self._gpus][each.kind.removeprefix("gpu_")] = each.end
                case "admin_certificate":
                    pass  # who reads this has seen it
        for gauge, numbers in ends.items():
            self._set(gauge, numbers, gone=math.nan)  # which raises no alarm

    def count(self, counts: Counts) -> None:
        """Set the gauges of what the store holds."""
        self._set(self._keys, counts.states, gone=0)
        self._set(self._sealed, counts.sealed, gone=0)
        self._audit.set(counts.audit_position)

    def _set(self, gauge: Gauge, numbers: Mapping[str, float], *, gone: float) -> None:
        """Set each label's number, and ``gone`` for what was there before: files of several processes keep it."""
        seen = self._labels_seen.setdefault(gauge, set())
        seen.update(numbers)
        for label in seen:
            gauge.labels(label).set(numbers.get(label, gone))

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        mode: Any = "livesum" if name in _SUMMED else "livemostrecent"
        return Gauge(f"{_PREFIX}_{name}", about, labels, registry=self.registry, multiprocess_mode=mode)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", about, labels, registry=self.registry, buckets=buckets)


class MeteredPerformer(Performer):
    """Performs effects as ``inner`` does, and measures them.

    A step's time includes its wait for a thread. The step ``compute`` is the time of a request in which nothing was
    waited for.
    """

    def __init__(self, inner: Performer, metrics: Metrics) -> None:
        super().__init__()
        self._inner = inner
        self._metrics = metrics

    async def run(self, flow: Flow[T]) -> T:
        """See `Performer.run`."""
        waited = 0.0

        async def perform(effect: Effect[Any]) -> object:
            nonlocal waited
            began = time.monotonic()
            try:
                return await self.perform(effect)
            finally:
                waited += time.monotonic() - began

        began = time.monotonic()
        try:
            return await effects.run_async(flow, perform, self._inner._at_once)  # noqa: SLF001 - of the same class
        finally:
            self._metrics.step("compute", max(0.0, time.monotonic() - began - waited))

    async def perform(self, effect: Effect[Any]) -> object:
        """See `Performer.perform`."""
        match effect:
            case effects.Transact(unit):
                return await self._measured(effect, "store", lambda exc: self._metrics.transaction(unit, exc))
            case effects.FetchCollateral():
                return await self._measured(effect, "collateral", self._metrics.collateral)
            case effects.FetchEvidence():
                return await self._measured(effect, "host", lambda _: None)
            case _:
                return await self._inner.perform(effect)

    async def _measured(self, effect: Effect[Any], step: str, ended: Callable[[BaseException | None], None]) -> object:
        began = time.monotonic()
        error: BaseException | None = None
        try:
            return await self._inner.perform(effect)
        except BaseException as exc:
            error = exc
            raise
        finally:
            self._metrics.step(step, time.monotonic() - began)
            ended(error)
