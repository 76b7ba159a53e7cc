"""The pytest plugin from outside: what users who load it see."""

import os
import pwd
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from podwire.testing.plugin import is_allowed

SKIPPING = """
    import pytest

    def test_one():
        pytest.skip("no such card")

    @pytest.mark.skip(reason="no such card either")
    def test_two():
        pass

    @pytest.mark.xfail
    def test_three():
        assert False
"""


def run(folder: Path, source: str, *options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit status, output) of pytest over one module, in a process of its own."""
    (folder / "test_it.py").write_text(textwrap.dedent(source))
    plugins = ("-p", "podwire.testing.plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *options, "test_it.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=25, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("reason", "lines", "covered"),
    [
        ("no such card", "# nothing\n", False),
        ("no such card", "no such card  # comment\n", True),
        ("no such card either", "no such card\n", False),
        ("no such card either", "\nno such*\n", True),
        ("no such card", "such*\n", False),
    ],
)
def test_lines_of_the_list(reason: str, lines: str, covered: bool) -> None:
    assert is_allowed(reason, lines) is covered


@pytest.mark.parametrize(("lines", "status"), [("no such card", 1), ("no such*", 0)])
def test_a_skip_that_is_not_listed_fails_the_run(tmp_path: Path, lines: str, status: int) -> None:
    (tmp_path / "allowed.txt").write_text(lines)
    done, output = run(tmp_path, SKIPPING, "--allowed-skips=allowed.txt")
    assert done == status, output
    assert ("skips that are not allowed" in output) == bool(status)


def test_a_kernel_test_runs_in_namespaces_of_its_own(tmp_path: Path) -> None:
    source = f"""
        import os
        import socket
        import pytest

        @pytest.mark.kernel
        def test_it(make_netns, netns):
            assert os.readlink("/proc/self/ns/net") != {str(Path("/proc/self/ns/net").readlink())!r}
            assert os.geteuid() == 0
            with socket.create_server(("127.0.0.1", 0)):
                pass
            assert make_netns() != netns

        @pytest.mark.needs("nftables")
        async def test_nft(linux_kernel):
            assert (await linux_kernel.observe_nft("none")).tables == {{}}
    """
    done, output = run(tmp_path, source, "-o", "asyncio_mode=auto")
    assert done == 0, output


@pytest.mark.parametrize("env", [{}, {"USER": "somebody"}], ids=str)
def test_users_keep_their_name_in_the_namespaces(tmp_path: Path, env: dict[str, str]) -> None:
    """pytest refuses to share the temporary folder of another user, such as the machine's root."""
    source = f"""
        import getpass
        import pytest

        @pytest.mark.kernel
        def test_it(tmp_path):
            assert getpass.getuser() == {env.get("USER", pwd.getpwuid(os.getuid()).pw_name)!r}
    """
    done, output = run(tmp_path, source, env={**env, "PYTEST_DEBUG_TEMPROOT": str(tmp_path)})
    assert done == 0, output


def test_pure_tests_stay_where_they_are(tmp_path: Path) -> None:
    source = f"""
        import os

        def test_it():
            assert os.readlink("/proc/self/ns/user") == {str(Path("/proc/self/ns/user").readlink())!r}
    """
    done, output = run(tmp_path, source)
    assert done == 0, output


def test_a_module_that_starts_threads_is_named(tmp_path: Path) -> None:
    source = """
        import threading
        import pytest

        threading.Thread(target=threading.Event().wait, name="stray", daemon=True).start()

        @pytest.mark.kernel
        def test_it():
            pass
    """
    done, output = run(tmp_path, source)
    assert done != 0
    assert "stray" in output


def test_an_unknown_feature_is_an_error(tmp_path: Path) -> None:
    source = """
        import pytest

        @pytest.mark.needs("flux capacitor")
        def test_it():
            pass
    """
    done, output = run(tmp_path, source)
    assert done == 1
    assert "flux capacitor" in output
