"""Kernel switches that cannot be set: told once, and tried again with the device whose they are."""

import errno

import pytest

from podwire.agent.switches import RefusedSwitches
from podwire.model.kernelstate import Device, Link
from podwire.model.ops import AddLink, Applied, DelLink, Failure, Plan, SetSysctl

GLOBAL = SetSysctl("net/bridge/bridge-nf-call-iptables", "1")
OWN = SetSysctl("net/ipv4/conf/eth0/rp_filter", "2")
PLAN: Plan = (GLOBAL, OWN, DelLink("x"))


def refusing(*ops: SetSysctl | DelLink) -> Applied:
    return Applied(0, tuple(Failure(op, errno.ENOENT, "No such file or directory") for op in ops))


def test_a_refused_switch_is_told_once_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    switches = RefusedSwitches()
    switches.devices(["eth0"])
    for _ in range(2):
        assert [f.op for f in switches.note(PLAN, refusing(*PLAN))] == [DelLink("x")]  # type: ignore[arg-type]
    assert switches.words.keys() == {GLOBAL.key, OWN.key}
    assert caplog.text.count("cannot be set") == 2
    switches.devices(["eth0", "eth1"])
    assert switches.worth_trying(PLAN) == (DelLink("x"),)


def test_with_a_new_device_its_switches_are_tried_again() -> None:
    switches = RefusedSwitches()
    switches.devices([])
    switches.note(PLAN, refusing(GLOBAL, OWN))
    made: Plan = (AddLink(Link("eth0", Device())), OWN)
    assert switches.worth_trying(made) == made, "the device is made in this very plan"
    switches.devices(["eth0"])
    assert switches.worth_trying(PLAN) == (OWN, DelLink("x"))
    assert switches.words.keys() == {GLOBAL.key}


def test_what_could_be_set_is_not_refused_any_more() -> None:
    switches = RefusedSwitches()
    switches.note((GLOBAL,), refusing(GLOBAL))
    switches.note((GLOBAL,), Applied(1))
    assert switches.words == {}
