"""Quoters of a real machine, against what behaves as its kernel and its host do, and as they do not."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chutes_proto.effects import Flow, MakeQuote
from chutes_proto.errors import LocalProtocolError, QuoteUnavailable
from chutes_proto.io import agent
from chutes_proto.io.agent import TimedQuoter
from chutes_proto.io.drivers import aio
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.quoters import tsm
from chutes_proto.io.quoters.device import (
    DeviceQuoter,
    UnixService,
    VsockService,
    get_report,
    request_quote,
)
from chutes_proto.io.quoters.tsm import TsmQuoter
from chutes_proto.testing._platform import SimulatedPlatform
from tests.guest_kernel import Entry, GuestKernel, fail, guest_kernel, jump
from tests.loops import on_loop
from tests.qgs import listening, qgs_answer, quoting

DATA = bytes(range(64))
PLATFORM = SimulatedPlatform(b"the seed of a TD")
QUOTE = PLATFORM.quote(DATA)
REPORT = bytes(128) + DATA + bytes(1024 - 192)


# --- configfs-TSM ---


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[GuestKernel]:
    with guest_kernel(tmp_path, PLATFORM.quote) as running:
        yield running


def test_a_quote_from_an_entry_of_its_own_that_is_gone_afterwards(kernel: GuestKernel) -> None:
    quoter = TsmQuoter(kernel.reports)
    assert quoter(DATA) == QUOTE
    assert quoter(bytes(64)) == PLATFORM.quote(bytes(64))
    assert kernel.entries == {}
    first, second = kernel.made
    assert first != second
    assert all(len(name) == len("chutes-proto-") + 32 for name in kernel.made)


@pytest.mark.parametrize("passing", ["EBUSY", "EWOULDBLOCK", "EINTR", "ETIMEDOUT", "ENOENT"])
def test_what_passes_is_tried_again(kernel: GuestKernel, passing: str) -> None:
    kernel.faults["outblob"].extend([fail(getattr(errno, passing))] * 2)
    assert TsmQuoter(kernel.reports)(DATA) == QUOTE
    assert kernel.entries == {}


def test_a_host_that_stays_busy(kernel: GuestKernel) -> None:
    kernel.faults["outblob"].extend([fail(errno.EBUSY)] * 100)
    with pytest.raises(QuoteUnavailable, match=r"gave no quote within 0\.2 s: .*outblob: Device or resource busy"):
        _ = TsmQuoter(kernel.reports, timeout=0.2)(DATA)
    assert len(kernel.made) > 1
    assert kernel.entries == {}


def test_a_quote_that_takes_its_time(kernel: GuestKernel) -> None:
    asked = threading.Event()
    made = threading.Event()

    def late(_: object) -> None:
        asked.set()
        assert made.wait(60)

    def host() -> None:
        assert asked.wait(60)
        made.set()

    kernel.faults["outblob"].append(late)
    thread = threading.Thread(target=host)
    thread.start()
    assert TsmQuoter(kernel.reports, timeout=0)(DATA) == QUOTE
    thread.join()


def test_an_entry_name_that_is_taken_and_a_kernel_out_of_memory(kernel: GuestKernel) -> None:
    kernel.faults["mkdir"].append(fail(errno.EEXIST))
    assert TsmQuoter(kernel.reports)(DATA) == QUOTE
    kernel.faults["mkdir"].append(fail(errno.ENOMEM))
    with pytest.raises(QuoteUnavailable, match="no entry can be made: Cannot allocate memory"):
        _ = TsmQuoter(kernel.reports)(DATA)


def overwrite(entry: Entry) -> None:
    """Somebody else asks for a quote of his own data, through our entry."""
    entry.written += 1
    entry.inblob = bytes(64)


@pytest.mark.parametrize("where", ["inblob", "outblob"])
def test_somebody_else_who_writes_is_noticed(kernel: GuestKernel, where: str) -> None:
    kernel.faults[where].append(overwrite)
    assert TsmQuoter(kernel.reports)(DATA) == QUOTE
    assert len(kernel.made) == 2
    kernel.faults[where].extend([jump] * 100)
    with pytest.raises(QuoteUnavailable, match="within 0 s: somebody else wrote to"):
        _ = TsmQuoter(kernel.reports, timeout=0)(DATA)
    assert kernel.entries == {}


def test_a_write_that_the_kernel_drops_is_noticed(kernel: GuestKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsm, "_SETTLE", 0.05)
    kernel.faults["inblob"].append(fail(errno.EBUSY))
    assert TsmQuoter(kernel.reports)(DATA) == QUOTE
    assert len(kernel.made) == 2
    kernel.faults["inblob"].append(fail(errno.EBUSY))
    with pytest.raises(QuoteUnavailable, match="within 0 s: the kernel did not take the report data"):
        _ = TsmQuoter(kernel.reports, timeout=0)(DATA)


def test_an_entry_that_vanishes(kernel: GuestKernel) -> None:
    kernel.faults["inblob"].append(kernel.vanish)
    kernel.faults["outblob"].append(kernel.vanish)
    assert TsmQuoter(kernel.reports)(DATA) == QUOTE
    assert len(kernel.made) == 3
    assert kernel.entries == {}


def test_another_provider(kernel: GuestKernel) -> None:
    kernel.provider = b"sev_guest\n"
    with pytest.raises(QuoteUnavailable, match="its provider is 'sev_guest', not 'tdx_guest'"):
        _ = TsmQuoter(kernel.reports)(DATA)
    assert len(kernel.made) == 1
    assert kernel.entries == {}


@pytest.mark.parametrize(("quote", "told"), [(b"", "the kernel's answer is empty"), (bytes(49153), "more than 49152")])
def test_what_is_no_quote(tmp_path: Path, quote: bytes, told: str) -> None:
    with guest_kernel(tmp_path, lambda _: quote) as kernel:
        with pytest.raises(QuoteUnavailable, match=told):
            _ = TsmQuoter(kernel.reports)(DATA)
        assert kernel.entries == {}


def test_a_fault_that_stays_is_told_at_once(kernel: GuestKernel) -> None:
    kernel.faults["outblob"].append(fail(errno.EIO))
    with pytest.raises(QuoteUnavailable, match="outblob: Input/output error"):
        _ = TsmQuoter(kernel.reports)(DATA)
    with pytest.raises(QuoteUnavailable, match="outblob: Invalid argument"):
        _ = TsmQuoter(kernel.reports)(b"too short")
    assert len(kernel.made) == 2
    assert kernel.entries == {}


@pytest.mark.parametrize(("number", "told"), [(errno.ENXIO, "load the module tdx_guest"), (errno.EPERM, "only root")])
def test_a_kernel_that_is_no_td(kernel: GuestKernel, number: int, told: str) -> None:
    kernel.faults["mkdir"].append(fail(number))
    with pytest.raises(QuoteUnavailable, match=told):
        _ = TsmQuoter(kernel.reports)(DATA)


def test_an_entry_that_stays_is_told_and_the_quote_is_given(
    kernel: GuestKernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.faults["rmdir"].append(fail(errno.EBUSY))
    assert TsmQuoter(kernel.reports)(DATA) == QUOTE
    assert "cannot be removed: Device or resource busy" in caplog.text


# --- the TDX guest device ---


@contextmanager
def unix_service(directory: Path, serve: Callable[[socket.socket], None]) -> Iterator[UnixService]:
    service = UnixService(str(directory / "qgs.socket"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(service.path)
    with listening(listener, serve):
        yield service


def run_device_quoter(device: Path, service: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Python does not let other threads run during this ioctl, and one is the kernel here."""
    code = (
        "import sys\nfrom chutes_proto.io.quoters.device import DeviceQuoter, UnixService\n"
        "print(DeviceQuoter(UnixService(sys.argv[2]), device=sys.argv[1])(bytes(range(64))).hex())"
    )
    command = [sys.executable, "-c", code, str(device), service]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_report_of_the_device_is_quoted(kernel: GuestKernel, tmp_path_factory: pytest.TempPathFactory) -> None:
    with unix_service(tmp_path_factory.mktemp("qgs"), quoting(PLATFORM.quote)) as service:
        ended = run_device_quoter(kernel.device, service.path)
        assert (ended.stdout.strip(), ended.stderr) == (QUOTE.hex(), "")
        kernel.faults["ioctl"].append(fail(errno.EIO))
        assert "tdx_guest gives no report: Input/output error" in run_device_quoter(kernel.device, service.path).stderr


def test_what_is_no_guest_device(tmp_path: Path) -> None:
    with pytest.raises(QuoteUnavailable, match="tdx_guest is not there: load the module tdx_guest"):
        _ = DeviceQuoter(device=tmp_path / "tdx_guest")(DATA)
    with pytest.raises(QuoteUnavailable, match="/dev/null gives no report: Inappropriate ioctl"):
        _ = DeviceQuoter(device="/dev/null")(DATA)
    with pytest.raises(LocalProtocolError, match="report data: 63 bytes; a report binds 64"):
        _ = DeviceQuoter(device="/dev/null")(DATA[:63])
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        _ = get_report(DATA, "/dev/null")


# --- the quote generation service ---


@pytest.mark.parametrize("settings", [{}, {"minor": 0}])
def test_the_service_quotes_the_report(tmp_path: Path, settings: dict[str, int]) -> None:
    with unix_service(tmp_path, quoting(PLATFORM.quote, **settings)) as service:
        assert request_quote(service, REPORT, 30) == QUOTE
        assert request_quote(service, REPORT, 30) == QUOTE


def test_the_service_over_vsock() -> None:
    """Uses the kernel's loopback (VMADDR_CID_LOCAL), which behaves like the host."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        port = listener.getsockname()[1]
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.settimeout(10)
            listener.listen()
            probe.connect((1, port))
            listener.accept()[0].close()
    except OSError as exc:
        listener.close()
        pytest.skip(f"this kernel has no vsock loopback (module vsock_loopback): {exc.strerror}")
    with listening(listener, quoting(PLATFORM.quote)):
        assert request_quote(VsockService(1, port), REPORT, 30) == QUOTE


def test_an_unreachable_service(tmp_path: Path) -> None:
    with pytest.raises(QuoteUnavailable, match=r"at /.*/none cannot be reached: No such file"):
        _ = request_quote(UnixService(str(tmp_path / "none")), REPORT, 30)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "closed the connection after 0 of 4 bytes"),
        (qgs_answer(QUOTE)[:3], "closed the connection after 3 of 4 bytes"),
        (qgs_answer(QUOTE)[:1000], "closed the connection after 996 of"),
        (b"\xff" * 100, "an answer of 4294967295 bytes does not come"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "an answer of 1213486160 bytes does not come"),
        (qgs_answer(b"", error=0x12001), "it made no quote: error 0x12001, unexpected error; its own log says more"),
    ],
)
def test_bytes_that_are_not_an_answer(tmp_path: Path, answer: bytes, told: str) -> None:
    def serve(connection: socket.socket) -> None:
        _ = connection.recv(65536)
        connection.sendall(answer)

    with (
        unix_service(tmp_path, serve) as service,
        pytest.raises(QuoteUnavailable, match=f"the quote generation service at .*: .*{told}"),
    ):
        _ = request_quote(service, REPORT, 30)


def silent(gone: threading.Event) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        _ = gone.wait(60)

    return serve


def dripping(gone: threading.Event) -> Callable[[socket.socket], None]:
    """A service that is never silent for long, and never finishes."""

    def serve(connection: socket.socket) -> None:
        connection.sendall((60000).to_bytes(4, "big"))
        while not gone.wait(0.01):
            connection.sendall(b"x")

    return serve


@pytest.mark.parametrize("service", [silent, dripping])
def test_a_service_that_never_ends(tmp_path: Path, service: Callable[..., Callable[[socket.socket], None]]) -> None:
    gone = threading.Event()
    with unix_service(tmp_path, service(gone)) as address:
        with pytest.raises(QuoteUnavailable, match=r"did not answer within 0\.3 s"):
            _ = request_quote(address, REPORT, 0.3)
        gone.set()


# --- a deadline ---

ENDED = "the deadline, retry.deadline_seconds, ended it$"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """A deadline in the past, after which a quote has little time."""
    monkeypatch.setattr(agent, "LEAST_SECONDS", 0.3)
    return 0.0


def test_the_deadline_ends_configfs_and_its_entry_is_gone(kernel: GuestKernel, soon: float) -> None:
    kernel.faults["outblob"].extend([fail(errno.EBUSY)] * 1000)
    with pytest.raises(QuoteUnavailable, match=f"^configfs-TSM at .*: {ENDED}"):
        _ = TimedQuoter(TsmQuoter(kernel.reports), soon)(DATA)
    assert kernel.entries == {}


@pytest.mark.parametrize("service", [silent, dripping])
def test_the_deadline_ends_a_service_that_never_does(
    tmp_path: Path, soon: float, service: Callable[..., Callable[[socket.socket], None]]
) -> None:
    gone = threading.Event()
    with unix_service(tmp_path, service(gone)) as address:
        with pytest.raises(QuoteUnavailable, match=ENDED):
            _ = TimedQuoter(lambda _: request_quote(address, REPORT, 30), soon)(DATA)
        gone.set()


# --- what all of them are for ---


def test_every_driver_accepts_these_quoters(kernel: GuestKernel) -> None:
    def flow() -> Flow[bytes]:
        return (yield from MakeQuote(DATA))

    for loop in ("trio", "asyncio"):
        assert on_loop(loop, aio.Performer(quoter=TsmQuoter(kernel.reports)).run, flow()) == QUOTE
    assert Performer(quoter=TsmQuoter(kernel.reports)).run(flow()) == QUOTE
