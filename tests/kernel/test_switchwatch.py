"""Kernel switches are looked at through descriptors that belong to the namespace in which they were opened."""

from collections.abc import Callable

import pytest

from podwire.kernel.switchwatch import SwitchWatch
from podwire.kernel.sysctl import write_sysctls

pytestmark = pytest.mark.kernel

FORWARD = "net/ipv4/ip_forward"


def test_what_somebody_else_sets_is_told_once(make_netns: Callable[[], int]) -> None:
    fd, other = make_netns(), make_netns()
    written = {FORWARD: "1", "net/ipv4/no_such_switch": "1"}
    assert write_sysctls(fd, {FORWARD: "1"}) == {}
    watch = SwitchWatch(fd, written)
    try:
        assert watch.look() == []
        write_sysctls(other, {FORWARD: "0"})  # another namespace's
        assert watch.look() == []
        write_sysctls(fd, {FORWARD: "0"})
        assert watch.look() == [(FORWARD, "0")]
        assert watch.look() == []
        write_sysctls(fd, {FORWARD: "1"})  # put back, as it was written
        assert watch.look() == []
        write_sysctls(fd, {FORWARD: "0"})
        assert watch.look() == [(FORWARD, "0")]
    finally:
        watch.close()


def test_a_change_of_our_own_is_not_told(make_netns: Callable[[], int]) -> None:
    fd = make_netns()
    written = {FORWARD: "0"}
    watch = SwitchWatch(fd, written)
    try:
        assert watch.look() == []
        write_sysctls(fd, {FORWARD: "1"})
        written[FORWARD] = "1"
        assert watch.look() == []
    finally:
        watch.close()
