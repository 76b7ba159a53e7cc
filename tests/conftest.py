"""Shared by all levels: podwire's own pytest plugin, as users have it."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from podwire.kernel.commands import administrators_path

pytest_plugins = ("podwire.testing.plugin",)

# Programs that tests compare with (ip, nft, iptables) are where an ordinary user's PATH does not lead.
os.environ["PATH"] = administrators_path(os.environ)

# A busy machine stops any test for longer than hypothesis allows an example; how long a test may take is pytest-timeout's.
settings.register_profile("podwire", settings(deadline=None))
settings.load_profile("podwire")


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """CI may have started this process with signals ignored, as nohup does; whom it starts would inherit that."""
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
