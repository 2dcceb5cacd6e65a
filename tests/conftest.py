"""Shared parts of all tests: Hypothesis profiles, real programs, the test vectors."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import postgres
from tests.canary import pytest_runtest_logstart, pytest_runtest_makereport, told_on_purpose

__all__ = ["pytest_runtest_logstart", "pytest_runtest_makereport", "told_on_purpose"]  # for pytest to find

ROOT = Path(__file__).resolve().parent.parent
CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
SOAK = bool(os.environ.get("CHUTES_PROTO_SOAK"))
"""Tests that have a long form take it; `make soak` sets this."""

# A shell without job control starts what is in its background with interrupts ignored, and `nohup` with hang-ups; so
# would every program be that a test starts and interrupts: it would go on for ever.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        _ = signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)

# Debian keeps nginx and cryptsetup where only root's PATH looks; what tests start looks there, too.
os.environ["PATH"] = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"

# A shared or slow machine must not turn into a failure, so no profile has a deadline. Another profile is chosen with
# `--hypothesis-profile NAME`.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _PATIENT, max_examples=25)
settings.register_profile("ci", _PATIENT, max_examples=25, derandomize=True, database=None, print_blob=True)
settings.register_profile("soak", _PATIENT, max_examples=10_000)
settings.load_profile("ci" if CI else "default")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of ``-n auto``: half as many again as there are processors, as many tests wait for a program or a time."""
    return (3 * len(os.sched_getaffinity(0)) + 1) // 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import all tests beforehand, in each worker of xdist from another one on.

    pytest rewrites the assertions of a module when it is imported, and keeps the byte code. Workers that import in the
    same order would each do all of that work; so each does a part, and finds the others' parts done. An error is raised
    again, and told, when pytest itself imports the module.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count == 1 or session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    first = len(paths) * int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) // count
    for path in paths[first:] + paths[:first]:
        with suppress(Exception, pytest.skip.Exception):
            _ = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """Keep Python from looking for cycles among all tests and modules, which live until the end."""
    gc.freeze()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
_HANDLERS = {number: signal.getsignal(number) for number in _SIGNALS}


def pytest_runtest_teardown() -> None:
    """Put handlers of signals back: a program that runs in this process leaves them ignored, because it is to end."""
    for number, handler in _HANDLERS.items():
        _ = signal.signal(number, handler)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Has a line about how much a test tried printed at the end of the run."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures of the tests that passed."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "figure" and report.when == "call":
                terminalreporter.write_line(f"{report.location[2]}: {text}")


@pytest.fixture(params=["trio", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    """The name of an event loop: a test that asks for it is run for each."""
    name: str = request.param
    return name


@pytest.fixture
def anyio_backend(loop: str) -> str:
    """Runs ``async def`` tests that are marked ``anyio`` on each event loop, where it is `loop` that they run on.

    Those marked ``trio`` are pytest-trio's, and run on trio.
    """
    return loop


@pytest.fixture(scope="session")
def require_program() -> Callable[[str], str]:
    """Gives the path of a real program; where it is missing the test is skipped, or fails when ``CI`` is set.

    Use it as ``cryptsetup = require_program("cryptsetup")``.
    """

    def require(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            refuse = pytest.fail if CI else pytest.skip
            refuse(f"the program {name} is not installed")
        return path

    return require


@pytest.fixture(scope="session")
def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs; where none is installed the test is skipped, or fails when ``CI`` is set."""
    programs = postgres.programs()
    if programs is None:
        refuse = pytest.fail if CI else pytest.skip
        refuse(f"no PostgreSQL: initdb is not installed (Debian: postgresql), and {postgres.VARIABLE} may name another")
    return programs


@pytest.fixture(scope="session")
def cluster(postgres_programs: Path) -> Iterator[postgres.Cluster]:
    """A private PostgreSQL."""
    cluster = postgres.Cluster(postgres_programs)
    yield cluster
    cluster.remove()


@pytest.fixture(scope="session")
def pooler(
    cluster: postgres.Cluster, require_program: Callable[[str], str]
) -> Iterator[Callable[[str], postgres.Pooler]]:
    """Gives the pgbouncer of a mode before the private PostgreSQL; each is started once."""
    program = require_program("pgbouncer")
    with ExitStack() as stack:
        yield cache(lambda mode: stack.enter_context(closing(postgres.Pooler(cluster, program, mode))))


@pytest.fixture
def pooled(cluster: postgres.Cluster, pooler: Callable[[str], postgres.Pooler]) -> Iterator[Callable[[str], str]]:
    """Gives the URL of an empty database behind the pgbouncer of a mode; it ends with the test."""
    with ExitStack() as stack:
        yield lambda mode: pooler(mode).before(stack.enter_context(cluster.database()))


@pytest.fixture(scope="session")
def databases(cluster: postgres.Cluster) -> Iterator[postgres.Schemas]:
    """The databases of `migrated_database`."""
    with closing(postgres.Schemas(cluster.database)) as databases:
        yield databases


@pytest.fixture
def migrated_database(databases: postgres.Schemas) -> Iterator[str]:
    """The URL of a database with our tables, as `migrated_schema`; a pooler may be before it."""
    with databases.borrow() as url:
        yield url


@pytest.fixture(scope="session")
def database(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL database in which tests may make schemas."""
    if named := os.environ.get(postgres.VARIABLE):
        return named
    private: postgres.Cluster = request.getfixturevalue("cluster")
    return private.url()


@pytest.fixture
def empty_schema(database: str) -> Iterator[str]:
    """The URL of an empty schema in PostgreSQL, which ends with the test."""
    with postgres.schema(database) as url:
        yield url


@pytest.fixture(scope="session")
def schemas(database: str) -> Iterator[postgres.Schemas]:
    """The schemas of `migrated_schema`."""
    with closing(postgres.Schemas(lambda: postgres.schema(database))) as schemas:
        yield schemas


@pytest.fixture
def migrated_schema(schemas: postgres.Schemas) -> Iterator[str]:
    """The URL of a schema with our tables in PostgreSQL, as `store init` leaves it; it is for this test alone."""
    with schemas.borrow() as url:
        yield url


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of test vectors beside the project (its README says what they are); skips where there is none."""
    folder = ROOT.parent / "shared" / "vectors"
    if not folder.is_dir():
        pytest.skip(f"no test vectors: {folder} is not there")
    return folder
