"""What FakeKernel has beyond the port: ordered failures, drift, and pods that end."""

import errno
import ipaddress

import pytest

from podwire.kernel.port import KernelEvent
from podwire.model.flow import Flow, FlowTuple
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, Link, Route, Veth
from podwire.model.ops import AddAddress, AddLink, DelRoute, SetRoute
from podwire.testing import FakeKernel
from podwire.testing.fakenetns import Refused

POD = NetnsName("pod/p")
ROUTE = Route(ipaddress.ip_network("10.9.0.0/16"), "br0")


async def test_fail_next_refuses_the_named_operation_that_often() -> None:
    kernel = FakeKernel()
    await kernel.apply((AddLink(Link("br0", Bridge())),))
    kernel.fail_next("SetRoute", errno.ENOBUFS, times=2)
    for expected in (errno.ENOBUFS, errno.ENOBUFS, None):
        applied = await kernel.apply((SetRoute(ROUTE), AddAddress(Address("br0", ipaddress.ip_interface("10.1.0.1/24")))))
        assert [failure.errno for failure in applied.failures] == ([expected] if expected else [])
    assert (await kernel.observe()).routes == {ROUTE}


async def test_drift_is_told_as_someone_elses() -> None:
    kernel = FakeKernel()
    await kernel.apply((AddLink(Link("br0", Bridge())), SetRoute(ROUTE)))
    stream = kernel.events()
    kernel.drift(DelRoute(ROUTE))
    assert await anext(stream) == KernelEvent(HOST, "route", "10.9.0.0/16 dev br0", removed=True)
    assert (await kernel.observe()).routes == frozenset()
    with pytest.raises(Refused):
        kernel.drift(SetRoute(Route(ROUTE.dst, "eth9")))
    await kernel.close()


async def test_a_pod_outlives_detach_but_not_destroy() -> None:
    kernel = FakeKernel(Link("eth0", Device()))
    kernel.attach(POD, 0)
    await kernel.apply((AddLink(Link("veth1", Veth("eth0", POD)), peer=Link("eth0", Veth("veth1"))),))
    kernel.detach(POD)
    kernel.attach(POD, 0)
    assert "eth0" in (await kernel.observe(POD)).links
    stream = kernel.events()
    kernel.destroy(POD)
    assert await anext(stream) == KernelEvent(HOST, "link", "veth1", removed=True)
    assert set((await kernel.observe()).links) == {"lo", "eth0"}
    kernel.attach(POD, 0)
    assert set((await kernel.observe(POD)).links) == {"lo"}
    await kernel.close()


async def test_flows_are_forgotten() -> None:
    kernel = FakeKernel()
    here, there = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.0.0.2")
    udp, tcp = (Flow(FlowTuple(here, there, p, 1, 2), FlowTuple(there, here, p, 2, 1)) for p in (17, 6))
    kernel.host.flows += [udp, tcp]
    assert await kernel.forget_flows(lambda flow: flow.original.protocol == 17) == 1
    assert kernel.host.flows == [tcp]
