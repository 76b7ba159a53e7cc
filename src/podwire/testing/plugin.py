"""pytest plugin: kernel tests in namespaces of their own, as root or not; skips that name what is missing; a check of skips.

A session with a test marked `kernel` or `lab` moves, before the first test, into a new user and network namespace with
`lo` up, so that no test can reach the machine's own network. In it the user is root and may make all the namespaces it likes.

* `@pytest.mark.kernel` alone needs namespaces; `@pytest.mark.needs("VXLAN devices")` more of `kernel.features.Feature`.
  What the machine lacks is a skip that names it.
* `--allowed-skips FILE` lists the reasons for which a test may be skipped, one per line (`#` begins a comment; a line that
  ends in `*` allows all that begin so). Any other skip fails the run.
"""

import asyncio
import getpass
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from podwire.kernel import netns, syscalls
from podwire.kernel.features import Feature, Features, probe_features
from podwire.kernel.linux import LinuxKernel
from podwire.model.errors import Unsupported
from podwire.model.kernelstate import Device, Link
from podwire.model.ops import ChangeLink

_FEATURES = pytest.StashKey[Features]()
_REFUSED = pytest.StashKey[str]()
_SKIPS = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allowed-skips", metavar="FILE", help="fail the run if a test is skipped for a reason that is not a line of FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*features): features of podwire.kernel.features that the kernel must have")
    config.stash[_SKIPS] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly or not any(_is_kernel(item) for item in session.items):
        return
    try:
        _enter_namespaces()
        config.stash[_FEATURES] = probe_features()
    except OSError as error:
        config.stash[_REFUSED] = f"user namespaces: {error.strerror}"


def _is_kernel(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("kernel", "lab", "needs"))


def _enter_namespaces() -> None:
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise pytest.UsageError(f"a test module starts threads on import, so namespaces cannot be entered: {names}")
    _keep_user_name()
    netns.enter_user_namespace(syscalls.CLONE_NEWNET, map_all=True)

    async def lo_up() -> None:
        kernel = LinuxKernel()
        try:
            await kernel.apply((ChangeLink(Link("lo", Device(), up=True)),))
        finally:
            await kernel.close()

    asyncio.run(lo_up())


def _keep_user_name() -> None:
    """Within the namespaces an ordinary user is root. Where the environment has no name either, pytest would look for its
    temporary files where the machine's root has them, and refuse those."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user that the machine has no name for
        name = f"uid-{os.getuid()}"
    os.environ.setdefault("LOGNAME", name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not _is_kernel(item):
        return
    refused = item.config.stash.get(_REFUSED, None)
    if refused is not None:
        pytest.skip(refused)
    wanted = [Feature.NAMESPACES]
    for marker in item.iter_markers("needs"):
        wanted += [Feature(name) for name in marker.args]
    try:
        item.config.stash[_FEATURES].require(*wanted)
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's old-style wrapper
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        item.config.stash[_SKIPS].append((item.nodeid, reason.removeprefix("Skipped: ")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _forbidden_skips(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    forbidden = _forbidden_skips(config)
    if forbidden:
        terminalreporter.section("skips that are not allowed", red=True)
        for nodeid, reason in forbidden:
            terminalreporter.line(f"{nodeid}: {reason}")


def _forbidden_skips(config: pytest.Config) -> list[tuple[str, str]]:
    file = config.getoption("--allowed-skips")
    if not file:
        return []
    allowed = Path(file).read_text()
    return [(nodeid, reason) for nodeid, reason in config.stash[_SKIPS] if not is_allowed(reason, allowed)]


def is_allowed(reason: str, allowed: str) -> bool:
    """Whether a line of the list `allowed` covers the reason of a skip."""
    lines = filter(None, (line.split("#", 1)[0].strip() for line in allowed.splitlines()))
    return any(reason.startswith(line[:-1]) if line.endswith("*") else reason == line for line in lines)


@pytest.fixture
def make_netns() -> Iterator[Callable[[], int]]:
    """A function that makes a network namespace and returns its descriptor; all are closed after the test."""
    made: list[int] = []

    def make() -> int:
        made.append(netns.create_netns())
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture(name="netns")
def netns_fixture(make_netns: Callable[[], int]) -> int:
    """The descriptor of a new network namespace."""
    return make_netns()


@pytest_asyncio.fixture
async def linux_kernel(netns: int) -> AsyncIterator[LinuxKernel]:
    """A LinuxKernel whose own namespace is a new one."""
    kernel = LinuxKernel(netns)
    try:
        yield kernel
    finally:
        await kernel.close()
