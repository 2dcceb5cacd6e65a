"""A server that reads its files again: what changes, that all of it changes or nothing, and for whom."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from socket import AF_UNIX, SHUT_RDWR, SOCK_STREAM, socket, socketpair
from typing import Any

import pytest
from attrs import evolve, fields
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.files import Files, write_file
from chutes_proto.io.server.control import Control
from chutes_proto.io.server.development import write_gpus
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.io.server.reload import Prepared, Running, prepare
from chutes_proto.io.server.serving import open_store
from chutes_proto.io.server.setup import ServerSetup, load_config, make_setup
from chutes_proto.io.server.workers import Supervisor, _packed, obey
from chutes_proto.io.server.workers import _Worker as Worker
from chutes_proto.quote._policy import Policy, TcbPolicy
from chutes_proto.quote._policy_set import PolicySet
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._service import _CARRIED, Service
from chutes_proto.store._rows import AuditRow, Insert, KeyringRow, Scan
from chutes_proto.store._run import Ask
from chutes_proto.testing._gpus import SimulatedGpus
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform
from chutes_proto.units.log import LOG
from tests.certificates import chained
from tests.cli.conftest import HOTKEY
from tests.conftest import SOAK
from tests.scenario.premises import Premises
from tests.scenario.test_workers import children, records
from tests.server.world import World, service
from tests.waiting import wait_until

STALE = "tcb_out_of_date"
OUTDATED = 'tcb.accepted_statuses = ["UpToDate", "OutOfDate"]'
GPU_KIND = """
[gpus.b300]
model = " B300"
memory_gb = 288
processors = 148
max_threads_per_processor = 1024
clock_base_mhz = 1590
clock_boost_mhz = 1965
"""
OTHER = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Premises]:
    """Premises with a control socket and a policy, whose VMs are out of date."""
    premises = Premises(tmp_path / "site", "sqlite:keys.db")
    premises.edit("hotkeys =", 'control = "control.sock"\npolicy = "policy.toml"\nhotkeys =')
    (premises.directory / "policy.toml").touch()
    premises.platform = premises.platform.having(STALE)
    yield premises
    premises.close()


def say_policy(site: Premises, text: str) -> None:
    write_file(site.directory / "policy.toml", text.encode())


def reload(site: Premises, *, refused: bool = False) -> Any:
    ended = site.here("reload", "--json")
    assert ended.code == refused, ended
    return ended.json


def test_a_reload_changes_all_that_it_can_and_names_the_rest(site: Premises) -> None:
    site.start()
    assert site.vm().boot(status=403)["code"] == "tcb_rejected"
    assert reload(site)["changes"] == []
    say_policy(site, OUTDATED)
    done = reload(site)
    assert (done["changes"], done["needs_restart"]) == (["policy"], [])
    assert site.vm().boot()["boot_token"]

    newer = PROFILE.to_toml() + evolve(PROFILE, name="newer", mrtd=bytes(48)).to_toml()
    write_file(site.directory / "measurements.toml", newer.encode())
    site.edit('hotkeys = "*"', f'hotkeys = ["{HOTKEY}", "{OTHER}"]')
    identity = make_server_identity(site.now - 86_400, os.urandom(32))
    write_file(site.directory / "server.pem", identity.chain_pem)
    write_file(site.directory / "server.key", identity.key_pem.reveal(), mode=0o600)
    site.new_key()
    _ = (site.directory / "collateral").rename(site.directory / "elsewhere")
    site.edit('collateral = { directory = "collateral" }', 'collateral = { directory = "elsewhere" }')
    with site.configuration.open("a") as file:
        _ = file.write(GPU_KIND)
    site.edit('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:1"')
    done = reload(site)
    changes = [change.partition(": issued")[0] for change in done["changes"]]
    assert changes == ["reference values: newer 1 added", "hotkeys", "GPU kinds", "collateral", "certificate", "KEK"]
    assert done["needs_restart"] == ["listen"]
    write_file(site.ca, identity.ca_pem)
    assert len(site.vm().ask("GET", "/servers/tee/measurements")) == 2
    assert site.vm().boot()["boot_token"]
    rows = site.json("audit", "list")["rows"]
    (reason,) = [row["reason"] for row in rows if row["event"] == "reloaded" and "KEK" in row["reason"]]
    assert reason.startswith(f"uid {os.getuid()}: {done['before']} to {done['after']}: reference values")
    site.edit(f'"{HOTKEY}", ', "")
    assert reload(site)["changes"] == [f"hotkeys: {HOTKEY} removed"]
    write_file(site.directory / "measurements.toml", f"# as before\n{newer}".encode())
    site.edit("hotkeys =", f'blacklist = {{ "{HOTKEY}" = "gone" }}\nhotkeys =')
    assert reload(site)["changes"] == [
        *("reference values: no profile differs", "hotkeys: the order, or the blacklist")
    ]
    assert site.vm().boot(status=403)["code"] == "hotkey_rejected"
    said = site.here("reload")
    head, tail = "nothing has changed\nnot applied until a restart: listen\n", "note: policy: tcb.platform_grace: "
    assert (said.code, said.out.startswith(head), tail in said.out) == (0, True, True)
    with site.configuration.open("a") as file:
        _ = file.write("[schedule.1]\nnot_after = 2001-01-01\n")  # a date in the past, where a later one was meant
    say_policy(site, "tcb.min_tcb_date = 2199-01-01\ntcb.min_evaluation_number = 1")
    policy, none_counts, *ended = reload(site)["warnings"]
    assert policy.startswith("policy: tcb.min_tcb_date: 2199-01-01T00:00:00Z is in the future, so every platform is")
    assert none_counts == "profiles: none counts now, so no VM is granted; change their schedule"
    assert [one.partition(" ended ")[0] for one in ended] == ["profile: newer 1", "profile: simulated 1"]
    checked = site.here("serve", "--check")
    assert (checked.code, policy in checked.out, none_counts in checked.err) == (1, True, True)


def test_a_certificate_that_vms_may_not_trust_is_told(site: Premises) -> None:
    """A name less, or the leaf without the CA between: the server cannot know what images trust, its operator does."""
    site.start()

    def renew(chain: bytes, key: bytes) -> list[str]:
        write_file(site.directory / "server.pem", chain)
        write_file(site.directory / "server.key", key, mode=0o600)
        changes: list[str] = reload(site)["changes"]
        return changes

    identity = make_server_identity(site.now - 86_400, os.urandom(32), ["keys.example", "127.0.0.1"])
    (first,) = renew(identity.chain_pem, identity.key_pem.reveal())
    assert first.startswith("certificate: keys.example added, ::1, localhost removed; issued under CN=chutes-proto ")
    chain, key = chained(2)
    (told,) = renew(chain, key)
    assert told.startswith("certificate: 127.0.0.1, keys.example removed; issued under CN=level 2, and the one before ")
    leaf = chain.partition(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    assert renew(leaf, key) == ["certificate: issued under CN=level 1, and the one before under CN=level 2"]
    assert renew(leaf + b"\n", key) == ["certificate"]


def test_who_names_another_file_is_told_which_one_the_server_reads(
    site: Premises, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.start()
    mine = site.configuration
    assert (reload(site)["configuration"], "the server reads" in site.here("reload").out) == (str(mine), False)
    link, other = site.directory / "link.toml", site.directory / "other.toml"
    link.symlink_to(mine)
    write_file(other, mine.read_bytes(), mode=0o600)
    for named, is_told in ((link, False), (other, True)):
        monkeypatch.setattr(Premises, "configuration", named)
        assert (f"note: the server reads {mine}, and not {named}" in site.here("reload").out) == is_told


def test_what_cannot_be_used_changes_nothing_and_says_why(site: Premises) -> None:
    site.start()
    say_policy(site, OUTDATED)
    assert reload(site)["changes"] == ["policy"]
    good = site.configuration.read_text()

    def refused(change: Callable[[], object]) -> str:
        change()
        error: str = reload(site, refused=True)["error"]
        say_policy(site, OUTDATED)
        _ = site.configuration.write_text(good)
        assert site.vm().boot()["boot_token"]  # by the last good one
        return error

    assert "tcb.alow_smt: Unknown key; did you mean allow_smt?" in refused(lambda: say_policy(site, "tcb.alow_smt = 1"))
    impossible = refused(lambda: say_policy(site, "tcb.platform_grace = 1"))
    assert "platform_grace: goes with an OutOfDate status" in impossible
    assert "hotkeys" in refused(lambda: site.edit('hotkeys = "*"', 'hotkeys = ["5G"]'))

    def two() -> None:
        say_policy(site, "tcb = 1")
        site.edit("measurements.toml", "nowhere.toml")

    several = refused(two)
    assert "policy: " in several
    assert "nowhere.toml" in several

    def pipe(name: str) -> None:  # it has no writer, so a reload would wait for ever, and each later one for it
        (site.directory / name).unlink()
        os.mkfifo(site.directory / name)

    key = (site.directory / "kek").read_bytes()
    for name in ("policy.toml", "kek"):
        assert f"{name}: cannot be read: not a plain file" in refused(partial(pipe, name))
    assert "sealed under" in refused(lambda: write_file(site.directory / "kek", os.urandom(32), mode=0o600))
    write_file(site.directory / "kek", key, mode=0o600)
    assert reload(site)["changes"] == []
    site.wait_for_log('"event":"reload_refused"')
    assert site.server is not None
    say_policy(site, "")
    site.server.process.send_signal(signal.SIGHUP)
    _ = wait_until(lambda: [one for one in records(site, "reloaded") if one["caller"] == "SIGHUP"])
    assert site.vm().boot(status=403)["code"] == "tcb_rejected"
    with socket(AF_UNIX, SOCK_STREAM) as stranger:
        stranger.connect(str(site.directory / "control.sock"))
        stranger.sendall(b"restart")
        assert b"the only request is reload" in stranger.makefile("rb").readline()
    assert (site.directory / "control.sock").stat().st_mode & 0o777 == 0o600
    site.stop()
    assert not (site.directory / "control.sock").exists()
    ended = site.here("reload")
    assert (ended.code, "no server answers" in ended.err) == (2, True)


@contextmanager
def unrecorded(site: Premises) -> Iterator[None]:
    """The store takes everything but the audit row of a reload."""
    refuse = "WHEN NEW.event = 'reloaded' BEGIN SELECT RAISE(ABORT, 'no place'); END"
    site.sql(f"CREATE TRIGGER full BEFORE INSERT ON audit {refuse}")
    yield
    site.sql("DROP TRIGGER full")


def test_a_reload_that_the_store_does_not_record_changes_nothing(site: Premises) -> None:
    site.start()
    say_policy(site, OUTDATED)
    with unrecorded(site):
        assert "no place" in reload(site, refused=True)["error"]
    assert site.vm().boot(status=403)["code"] == "tcb_rejected"
    assert reload(site)["changes"] == ["policy"]
    assert site.vm().boot()["boot_token"]


@pytest.mark.skipif(not SOAK, reason="three workers take long to start: see `make soak`; the next is its short form")
def test_all_workers_reload_and_a_new_one_runs_by_the_same_files(site: Premises) -> None:
    site.start("--workers", "2")
    say_policy(site, OUTDATED)
    assert reload(site)["changes"] == ["policy"]
    for _ in range(4):
        assert site.vm().boot()["boot_token"]
    say_policy(site, "half a pol")  # the operator is not done yet
    pid = children(site)[0]
    os.kill(pid, signal.SIGKILL)
    _ = wait_until(lambda: len(records(site, "serving")) == 3)
    for _ in range(4):
        assert site.vm().boot()["boot_token"]
    assert "not TOML" in reload(site, refused=True)["error"]
    say_policy(site, "")
    assert reload(site)["changes"] == ["policy"]
    assert {site.vm().boot(status=403)["code"] for _ in range(4)} == {"tcb_rejected"}


def test_one_worker_that_cannot_keeps_all_from_it(site: Premises) -> None:
    """Workers as threads, so that one can fail alone; files, sockets, set-ups and store are real."""
    setup = make_setup(ServerConfig.load(site.configuration))
    runnings = [Running(setup) for _ in range(3)]
    with ExitStack() as opened:
        log = LogWriter(os.open("/dev/null", os.O_WRONLY))
        _ = opened.callback(log.close)
        supervisor = Supervisor(runnings[0], 2, [], [], False, log, keeps_metrics=False, stop_seconds=1)
        may_fail = [ConfigurationError("no memory"), ZeroDivisionError("of a secret")]

        def second(files: Files) -> Prepared:
            if may_fail:
                raise may_fail.pop(0)
            return prepare(runnings[2], None, files)

        def first(files: Files) -> Prepared:
            return prepare(runnings[1], None, files)

        for number, (running, check) in enumerate(zip(runnings[1:], (first, second), strict=True)):
            ours, theirs = map(opened.enter_context, socketpair())
            threading.Thread(target=obey, args=(theirs, check, running.replace), daemon=True).start()
            process: Any = None
            supervisor._workers.append(Worker(number, process, 0.0, ours))
        say_policy(site, OUTDATED)
        assert supervisor.reload("uid 7") == {"ok": False, "error": "worker 1: no memory"}
        assert "worker 1: a defect, ZeroDivisionError; " in str(supervisor.reload("uid 7")["error"])
        with unrecorded(site):
            assert "no place" in str(supervisor.reload("uid 7")["error"])
        assert all(running.setup is setup for running in runnings)
        done = supervisor.reload("uid 7")
        assert done["changes"] == ["policy"]
        assert {id(running.setup) for running in runnings}.isdisjoint({id(setup)})
        assert len({str(running.setup.service.policies) for running in runnings}) == 1


def test_the_root_of_trust_stays_until_a_restart_though_its_file_is_another(site: Premises) -> None:
    """The one who can write the file must not choose by whose word quotes are genuine, unseen by the audit log."""
    write_gpus(site.directory, SimulatedGpus(bytes(32), count=1), site.now, demand="record")
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    before = running.setup.service
    write_file(site.directory / "simulated-root.der", SimulatedPlatform(os.urandom(32)).root_der)
    write_file(site.directory / "gpus" / "policy.toml", b'revocation = "off"')
    site.edit("limits.drain_seconds = 0", "limits.drain_seconds = 1")
    found = prepare(running, None, Files())
    assert (found.changes, found.needs_restart) == ((), ("roots", "limits", "gpu_evidence"))
    later = make_setup(load_config(site.configuration, found.setup.files), found.setup.files)  # a new worker
    for one in (found.setup.service, later.service):
        assert (one.root, one.gpu_appraisal) == (before.root, before.gpu_appraisal)


def test_services_of_collateral_stay_until_a_restart(site: Premises) -> None:
    """The one that runs has what was fetched: the checks and the metrics would know of nothing by another one."""
    site.edit('collateral = { directory = "collateral" }', 'collateral = { upstreams = ["https://pccs.example:1"] }')
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    assert prepare(running, None, Files()).needs_restart == ()
    site.edit("pccs.example:1", "pccs.example:2")
    say_policy(site, "tcb.collateral_grace = 60")
    found = prepare(running, None, Files())
    assert (found.changes, found.needs_restart) == (("policy",), ("collateral", "collateral_grace"))
    assert found.setup.collateral is running.setup.collateral


def test_the_key_of_the_audit_log_is_sealed_under_the_kek_of_the_last_reload(
    site: Premises, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another one no server would start again: its KEK may be destroyed by then."""
    site.edit('store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "mark" }')
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    # The log is to begin after the reload.
    monkeypatch.setattr("chutes_proto.io.server.serving.record_start", lambda *_: None)
    with open_store(running) as (store, _):
        site.new_key()
        running.replace(prepare(running, store, Files()).setup)
        store.transact(Ask(Insert(AuditRow(site.now, "operator", "the log begins", "done", ""))))
        (key,) = wait_until(lambda: [key for key in store.transact(Ask(Scan(KeyringRow))) if key.kind == LOG])
        assert key.kek_id == running.setup.service.vault.current.kek_id


def test_workers_that_hang_hold_a_reload_no_longer_than_one_does(site: Premises) -> None:
    setup = make_setup(ServerConfig.load(site.configuration))
    with ExitStack() as opened:
        log = LogWriter(os.open("/dev/null", os.O_WRONLY))
        _ = opened.callback(log.close)
        supervisor = Supervisor(Running(setup), 8, [], [], False, log, keeps_metrics=False, stop_seconds=1)
        for number in range(8):
            ours, _ = map(opened.enter_context, socketpair())
            process: Any = None
            supervisor._workers.append(Worker(number, process, 0.0, ours))
        say_policy(site, OUTDATED)
        supervisor.prepare_seconds, began = 2, time.monotonic()
        error = str(supervisor.reload("uid 7")["error"])
        assert error.splitlines() == [f"worker {number}: timed out" for number in range(8)]
        assert time.monotonic() - began < 8 * 2  # as it would be of one after the other


def test_a_worker_that_may_open_no_file_carries_out_nothing_that_was_refused(site: Premises) -> None:
    """The kernel drops the descriptor then, and the words arrive."""
    setup = make_setup(ServerConfig.load(site.configuration))
    running, carried_out = Running(setup), list[ServerSetup]()
    with ExitStack() as opened:
        ours, theirs = map(opened.enter_context, socketpair())
        check = partial(prepare, running, None)
        threading.Thread(target=obey, args=(theirs, check, carried_out.append), daemon=True).start()
        process: Any = None
        worker = Worker(0, process, 0.0, ours)
        say_policy(site, OUTDATED)
        _ = prepare(running, None, files := Files())
        worker.ask("prepare", packed := _packed(files.content))  # which another worker refuses
        assert worker.answer(time.monotonic() + 60)["after"]
        limits = getrlimit(RLIMIT_NOFILE)
        setrlimit(RLIMIT_NOFILE, (3, limits[1]))
        try:
            worker.ask("prepare", packed)
            with pytest.raises(ConfigurationError, match=r"worker 0: .*Too many open files"):
                _ = worker.answer(time.monotonic() + 60)
        finally:
            setrlimit(RLIMIT_NOFILE, limits)
            os.close(packed)
    assert not carried_out


@pytest.mark.parametrize("how", ["closed", "reset", "ended", "cut"])
def test_a_worker_that_ends_is_called_that(how: str) -> None:
    ours, theirs = socketpair()
    process: Any = None
    worker = Worker(3, process, 0.0, ours)
    if how == "closed":  # by the supervisor, that has noted its end
        ours.close()
    if how == "cut":
        theirs.sendall(b'{"to"')
    worker.ask("prepare")
    if how == "ended":
        _ = theirs.recv(64)
    theirs.close()  # with what it has not read, the other end is reset
    with pytest.raises(ConfigurationError, match="worker 3: it ended meanwhile; reload again"):
        _ = worker.answer(time.monotonic() + 60)
    ours.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_one_to_a_later_reload(site: Premises) -> None:
    setup = make_setup(ServerConfig.load(site.configuration))
    with ExitStack() as opened:
        log = LogWriter(os.open("/dev/null", os.O_WRONLY))
        _ = opened.callback(log.close)
        supervisor = Supervisor(Running(setup), 1, [], [], False, log, keeps_metrics=False, stop_seconds=1)
        running, may_go_on = Running(setup), threading.Event()

        def check(files: Files) -> Prepared:
            assert may_go_on.wait(60)
            return prepare(running, None, files)

        ours, theirs = map(opened.enter_context, socketpair())
        threading.Thread(target=obey, args=(theirs, check, running.replace), daemon=True).start()
        process: Any = None
        supervisor._workers.append(Worker(0, process, 0.0, ours))
        say_policy(site, OUTDATED)
        supervisor.prepare_seconds = 0.1
        assert "timed out" in str(supervisor.reload("uid 7")["error"])
        supervisor.prepare_seconds = 60
        may_go_on.set()
        say_policy(site, "")
        assert supervisor.reload("uid 7")["changes"] == []
        say_policy(site, OUTDATED)
        assert supervisor.reload("uid 7")["changes"] == ["policy"]
        assert running.setup.service.policies == supervisor.running.setup.service.policies


def test_a_worker_that_prepared_nothing_carries_nothing_out() -> None:
    with ExitStack() as opened:
        ours, theirs = map(opened.enter_context, socketpair())
        threading.Thread(target=obey, args=(theirs, None, None), daemon=True).start()
        process: Any = None
        worker = Worker(0, process, 0.0, ours)
        worker.ask("commit")
        with pytest.raises(ConfigurationError, match="nothing is prepared"):
            _ = worker.answer(time.monotonic() + 60)
        ours.shutdown(SHUT_RDWR)  # ends the thread


def test_a_file_that_is_replaced_while_the_files_are_read_is_not_taken_half(site: Premises) -> None:
    """The certificate of one moment and the key of a later one, or half a policy: both could be valid files."""
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    say_policy(site, OUTDATED)
    for change in (lambda: say_policy(site, ""), (site.directory / "policy.toml").unlink):
        files = Files()
        _ = files.read(site.directory / "policy.toml")  # the first half of the reload
        _ = change()
        with pytest.raises(ConfigurationError, match=r"policy\.toml: was changed while the files were read; wait"):
            _ = prepare(running, None, files)
    say_policy(site, OUTDATED)
    assert prepare(running, None, Files()).changes == ("policy",)


def test_every_file_of_a_reload_is_checked_first_and_kept_for_new_workers(site: Premises) -> None:
    """Also those that a server without GPU evidence and callbacks has not."""
    write_gpus(site.directory, SimulatedGpus(bytes(32), count=1), site.now, demand="record")
    write_file(site.directory / "hotkey", wallet(bytes(32)), mode=0o600)
    site.edit("hotkeys =", 'registration = { evidence = "callback", hotkey_file = "hotkey" }\nhotkeys =')
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    read = {Path(path).name for path in running.setup.files.content}
    assert {"hotkey", "device-root.der", "rim-root.der", "server.key", "kek"} <= read
    write_file(site.directory / "hotkey", wallet(bytes(31) + b"1"), mode=0o600)
    write_file(site.directory / "gpus" / "rim-root.der", SimulatedPlatform(os.urandom(32)).root_der)
    found = prepare(running, None, Files())
    assert (found.changes, found.needs_restart) == (("registration hotkey",), ("gpu_evidence",))
    later = make_setup(load_config(site.configuration, found.setup.files), found.setup.files)  # a new worker
    hotkeys = [one.service.callback and one.service.callback.hotkey for one in (found.setup, later, running.setup)]
    assert hotkeys[0] == hotkeys[1] != hotkeys[2]
    assert later.service.gpu_appraisal == running.setup.service.gpu_appraisal
    write_file(site.directory / "hotkey", b"{}", mode=0o600)
    with pytest.raises(ConfigurationError, match=r"registration\.hotkey_file: "):
        _ = prepare(running, None, Files())


def wallet(seed: bytes) -> bytes:
    address = HotkeyPair.from_secret(Secret(seed)).hotkey.address
    return json.dumps({"secretSeed": f"0x{seed.hex()}", "ss58Address": address}).encode()


def test_the_audit_row_has_the_digest_of_a_changed_key_too(site: Premises) -> None:
    """Here a key in another form, which goes with the same certificate."""
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    key = load_pem_private_key((site.directory / "server.key").read_bytes(), None)
    other = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    write_file(site.directory / "server.key", other, mode=0o600)
    found = prepare(running, None, Files())
    assert found.changes == ("certificate",)
    assert found.before != found.after


def test_the_other_servers_are_told_the_settings_of_the_last_reload(site: Premises) -> None:
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    told = running.setup.alike
    before = told.settings
    say_policy(site, OUTDATED)
    running.replace(prepare(running, None, Files()).setup)
    assert running.setup.alike is told
    assert before != told.settings == make_setup(ServerConfig.load(site.configuration)).alike.settings


def test_a_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    _ = file.write_bytes(b"old")
    files = Files()
    assert files.read(file) == b"old"
    _ = file.write_bytes(b"new")
    assert files.read(file) == files.read_private(file) == b"old"
    file.unlink()
    assert Files(files.content).read(file) == b"old"


def test_the_control_socket_outlives_a_lack_of_descriptors(tmp_path: Path) -> None:
    control = Control(path := tmp_path / "control", lambda _: {"ok": True}, log_record)
    control.open()
    limits = getrlimit(RLIMIT_NOFILE)
    with ExitStack() as opened:
        clients = [opened.enter_context(socket(AF_UNIX, SOCK_STREAM)) for _ in range(3)]
        setrlimit(RLIMIT_NOFILE, (0, limits[1]))
        try:
            for client in clients[1:]:
                with client, suppress(OSError):  # the first is answered where its descriptor was taken before
                    _ = ask(client, path, seconds=0.5)
        finally:
            setrlimit(RLIMIT_NOFILE, limits)
        assert ask(clients[0], path, seconds=10) == b'{"ok": true}\n'
    control.close()
    assert not path.exists()


def ask(client: socket, path: Path, seconds: float) -> bytes:
    client.settimeout(seconds)
    client.connect(str(path))
    client.sendall(b"reload\n")
    return client.recv(64)


# --- one request sees one policy ---

ACCEPTING = service(policies=PolicySet(default=Policy(tcb=TcbPolicy(accepted_statuses=["UpToDate", "OutOfDate"]))))
OTHERS = evolve(PROFILE, name="other", mrtd=bytes(48))
REFUSING = service(hotkeys=frozenset({OTHER}), profiles={OTHERS.identity: ServedProfile(OTHERS, None, False, False)})


@settings(max_examples=40)
@given(st.integers(0, 12), st.booleans())
def test_a_request_sees_one_policy_whole_whenever_a_reload_comes(moment: int, is_accepting: bool) -> None:
    """Each difference between the two would show: another refusal, or a defect's 503."""
    before, after = (ACCEPTING, REFUSING) if is_accepting else (REFUSING, ACCEPTING)
    world = World(App(before))
    world.platform = world.platform.having(STALE)
    nonce = world.nonce()
    begun = len(world.asked)

    def maybe_reload(_: object) -> None:
        if len(world.asked) - begun == moment + 1:
            world.app.service = evolve(after).in_place_of(world.app.service)

    world.before = maybe_reload
    response = world.boot(nonce)
    world.before = lambda _: None
    reloaded = len(world.asked) - begun > moment
    assert _outcome(response) == _expected(before)
    world.app.service = world.app.service if reloaded else after.in_place_of(world.app.service)
    assert _outcome(world.boot()) == _expected(after)


def _expected(one: Service) -> int | tuple[int, bytes]:
    return 200 if one.hotkeys == "*" else (403, b"tcb_rejected")


def _outcome(response: Any) -> int | tuple[int, bytes]:
    if response.status == 200:
        return 200
    return response.status, b"tcb_rejected" if b"tcb_rejected" in response.body else response.body


def test_counters_outlive_a_reload(site: Premises) -> None:
    """Without the boots that are open a server that stops would end too early, and lose them."""
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    old = running.setup.service
    app = running.follow(App(old))
    site.edit('hotkeys = "*"', f'hotkeys = ["{OTHER}"]')
    running.replace(prepare(running, None, Files()).setup)
    assert app.service.hotkeys == frozenset({OTHER})
    assert [name for name in _CARRIED if getattr(app.service, name) is not getattr(old, name)] == []


CONFIGURED = frozenset(
    "vault mint root trust profiles hotkeys policies volumes netuid blacklist minimum_version signing_keys "
    "exchange_downgrade rotate_after signatures registration_evidence callback unsafe_networks fresh_seconds "
    "gpu_appraisal gpus proxies tokens maintenance documents".split()
)
"""The parts of a service that files decide, and those that follow from them."""


def test_each_part_of_a_service_is_read_again_or_carried_over() -> None:
    """A new part is one or the other: a set of revocations that a reload forgets would let everyone in again."""
    old, new = service(), service()
    carried = {
        one.name
        for one in fields(Service)
        if one.init and getattr(new.in_place_of(old), one.name) is getattr(old, one.name)
    }
    known = {one.name for one in fields(Service) if one.init}
    assert known - CONFIGURED <= carried
    assert known - CONFIGURED == {*_CARRIED}
