"""Tracked connections of real packets, read, looked up and forgotten."""

import ipaddress
import socket

import pytest

from podwire.kernel.conntrack import lookup, read_flows
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family
from podwire.model.flow import SEEN_REPLY, Flow
from podwire.model.kernelstate import Device, Link
from podwire.model.nft import AddChain, AddTable, BaseHook, Batch, Chain, Hook, Rule, SetRules, TableRef
from podwire.model.nftexpr import Ct, CtKey
from podwire.model.ops import ChangeLink, CommitNft
from podwire.wire.packet import Packet

pytestmark = [pytest.mark.kernel, pytest.mark.needs("nftables", "conntrack over netlink")]


def tracking(family: Family) -> Batch:
    """A rule that looks at conntrack: the kernel tracks connections in a namespace only once something asks."""
    table, chain = TableRef(family, "t"), Chain("c", BaseHook("filter", Hook.OUTPUT, 0))
    return Batch((AddTable(table), AddChain(table, chain), SetRules(table, "c", (Rule((Ct(CtKey.STATUS, 8),)),))))


def exchange(family: Family) -> tuple[int, int]:
    """One UDP packet each way over `lo`. Returns (client's port, server's port)."""
    af, host = (socket.AF_INET, "127.0.0.1") if family is Family.IPV4 else (socket.AF_INET6, "::1")
    with socket.socket(af, socket.SOCK_DGRAM) as server, socket.socket(af, socket.SOCK_DGRAM) as client:
        for sock in (server, client):
            sock.bind((host, 0))
            sock.settimeout(5)
        client.sendto(b"ping", server.getsockname())
        server.sendto(b"pong", server.recvfrom(10)[1])
        assert client.recv(10) == b"pong"
        return client.getsockname()[1], server.getsockname()[1]


@pytest.mark.parametrize("family", Family)
async def test_flow_is_read_looked_up_and_forgotten(linux_kernel: LinuxKernel, netns: int, family: Family) -> None:
    applied = await linux_kernel.apply((ChangeLink(Link("lo", Device(), up=True)), CommitNft(tracking(family))))
    assert applied.ok, applied.failures
    client, server = run_in_netns(netns, lambda: exchange(family))
    host = ipaddress.ip_address("127.0.0.1" if family is Family.IPV4 else "::1")

    (flow,) = await read_flows(netns, lambda flow: flow.original.dport == server)
    assert flow.original == (host, host, 17, client, server)
    assert flow.reply == (host, host, 17, server, client)
    assert flow.status & SEEN_REPLY
    assert flow.timeout_s > 0
    assert flow.id != 0
    assert not flow.source_translated
    assert not flow.destination_translated

    packet = Packet(host, host, 17, sport=client, dport=server)
    assert await lookup(netns, packet) == str(flow.original)

    def ours(flow: Flow) -> bool:
        return flow.original.protocol == 17 and flow.original.dport == server

    assert await linux_kernel.forget_flows(ours) == 1
    assert await linux_kernel.forget_flows(ours) == 0
    assert await lookup(netns, packet) == ""
