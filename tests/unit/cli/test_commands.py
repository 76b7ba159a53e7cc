"""The command line without a lab: help, versions, exit statuses, and that it starts quickly."""

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import podwire
from podwire.cli.main import main
from podwire.cli.podexec import exit_status
from podwire.cli.progress import Progress, counted
from podwire.cli.signals import exit_on_signals
from podwire.model.errors import PodwireError

HEAVY = ("aiohttp", "asyncio", "cryptography", "msgspec", "rich", "yaml")


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))


ALL = list(commands(main))


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    script = f"import sys, podwire.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) or "podwire" for path, _ in ALL])
def test_help_is_a_reference(path: tuple[str, ...], command: click.Command) -> None:
    done = CliRunner().invoke(main, [*path, "--help"])
    assert done.exit_code == 0
    assert command.help, "says what it does"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} is explained"
    assert "..." not in done.output.partition("Commands:")[2], "what a command does fits its line"


def test_version() -> None:
    for asked in ("version", "--version"):
        assert CliRunner().invoke(main, [asked]).output == f"podwire {podwire.__version__}\n"


def test_python_finds_it_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "podwire", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"podwire {podwire.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["lab", "up", "--nodes", "many"],
        ["lab", "up", "--service-cluster-ip-range", "10.0.0.0/16,10.1.0.0/16"],
        ["lab", "exec", "world"],
        ["lab", "exec", "world", "--"],
        ["paths", "--pod", "a"],
        ["paths", "-o", "xml"],
        ["demo", "--name", "Not-Good"],
        ["lab", "down", "Not-Good"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner(env={"PODWIRE_STATE_DIR": str(tmp_path)}).invoke(main, arguments)
    assert done.exit_code == 2, done.output


def test_a_missing_lab_is_status_1_and_one_sentence(tmp_path: Path) -> None:
    done = CliRunner(env={"PODWIRE_STATE_DIR": str(tmp_path)}).invoke(main, ["lab", "kubeconfig", "none"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: no lab named 'none' is up")


def test_a_broken_manifest_starts_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: Pod")
    done = CliRunner(env={"PODWIRE_STATE_DIR": str(tmp_path / "labs")}).invoke(main, ["lab", "up", "-f", str(bad)])
    assert done.exit_code == 1
    assert done.output == f"Error: {bad}, document 1 is no Kubernetes object: it needs apiVersion and kind\n"
    assert not (tmp_path / "labs").exists()


@pytest.mark.parametrize(
    ("document", "status"),
    [
        (b'{"status": "Success"}', 0),
        (b'{"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": "42"}]}}', 42),
    ],
)
def test_the_end_of_an_exec(document: bytes, status: int) -> None:
    assert exit_status(document) == status


def test_an_exec_that_never_ran() -> None:
    with pytest.raises(PodwireError, match="no such container"):
        exit_status(b'{"status": "Failure", "message": "no such container"}')


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_on_a_terminal_are_coloured_and_elsewhere_plain() -> None:
    for stream, expected in ((io.StringIO(), "✓ work  "), (Terminal(), "\x1b[32m✓\x1b[0m work  ")):
        with Progress(stream).step("work"):
            pass
        assert expected in stream.getvalue()
        assert stream.getvalue().count("work") >= 1


def test_a_step_that_fails_is_marked() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Progress(stream).step("work"):
        raise ValueError("broken")
    assert stream.getvalue().startswith("✗ work")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_step_that_somebody_ended_did_not_fail(end: type[BaseException]) -> None:
    stream = io.StringIO()
    with pytest.raises(end), Progress(stream).step("work"):
        raise end
    assert stream.getvalue() == ""


def test_one_is_singular() -> None:
    assert [counted(number, "node") for number in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_block_with_the_shells_status(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, exit_on_signals():
        signal.raise_signal(number)
    assert ended.value.code == status
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
