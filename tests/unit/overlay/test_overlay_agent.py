"""The overlay agent on a kernel in memory: what follows from leases that come, change, go, and are lost."""

import asyncio
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from overlaysite import PREFIX, Site, until

from podwire.agent.health import Health
from podwire.agent.overlayd.rules import ForwardRules, forward_text
from podwire.agent.subnets.port import Holding
from podwire.kernel.commands import Outcome
from podwire.model.kernelstate import Wireguard
from podwire.model.ops import ChangeLink, DelWireguardPeer, Op, SetWireguardPeer
from podwire.plan.underlay import Wish

THEIRS = "dGhlaXJrZXl0aGVpcmtleXRoZWlya2V5dGhlaXJrZXk="


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


VTEP = {"BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:02"}}


async def test_peers_come_change_and_go(site: Site) -> None:
    async with site.agent({"Type": "vxlan"}) as agent:
        assert agent.status().obstacles == ()
        await site.lease("10.5.40.0/24", **VTEP)
        await until(lambda: ("10.5.40.0/24", "flannel.1") in site.ways)
        moved = {"BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:99"}}
        await site.lease("10.5.40.0/24", **moved)
        await until(lambda: {entry.mac for entry in site.kernel.host.state().fdb} == {"02:00:00:00:00:99"})
        await site.client.delete(f"{PREFIX}/subnets/10.5.40.0-24")
        await until(lambda: not site.kernel.host.state().routes and not site.kernel.host.state().fdb)
        assert agent.status().peers == 0


async def test_a_peer_of_another_back_end_is_left_out_and_named(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with site.agent({"Type": "vxlan"}) as agent:
        await site.lease("10.5.40.0/24", BackendType="host-gw")
        await until(lambda: bool(agent.status().refused))
        assert agent.status().refused == {"10.5.40.0-24": "its backend is host-gw, not vxlan"}
        assert "peer 10.5.40.0-24 is left out: its backend is host-gw" in caplog.text
        assert agent.status().peers == 0
        await site.lease("10.5.40.0/24", **VTEP)
        await until(lambda: not agent.status().refused and agent.status().peers == 1)


async def test_a_lost_lease_is_replaced_and_devices_follow(site: Site) -> None:
    """Somebody deletes the lease, and another node takes the subnet at once."""
    async with site.agent({"Type": "vxlan"}, masquerade=True) as agent:
        before = site.env["FLANNEL_SUBNET"]
        own, value = site.own_key, {"PublicIP": "192.0.2.2", **VTEP}
        await site.client.delete(own)
        await site.client.put(own, json.dumps(value).encode())
        await until(lambda: site.env["FLANNEL_SUBNET"] != before)
        now = ipaddress.ip_interface(site.env["FLANNEL_SUBNET"]).network
        await until(lambda: agent.status().holding is Holding.HELD and agent.idle)

        def addresses() -> set[str]:
            return {
                str(a.interface)
                for a in site.kernel.host.state().addresses
                if a.dev == "flannel.1" and a.interface.version == 4
            }

        await until(lambda: addresses() == {f"{now.network_address}/32"})
        await until(lambda: (str(ipaddress.ip_interface(before).network), "flannel.1") in site.ways)


async def test_the_last_subnet_is_taken_again(site: Site) -> None:
    async with site.agent({"Type": "host-gw"}):
        before = site.env["FLANNEL_SUBNET"]
        key = site.own_key
    await site.client.delete(key)
    async with site.agent({"Type": "host-gw"}):
        assert site.env["FLANNEL_SUBNET"] == before


async def test_udp_follows_leases_of_any_type_and_opens_again(site: Site) -> None:
    site.host.refuse = 1
    await site.lease("10.5.40.0/24")
    async with site.agent({"Type": "udp"}) as agent:
        await until(lambda: bool(site.host.tunnels and site.host.tunnels[0].routes))
        assert site.host.tunnels[0].routes == {IPv4Network("10.5.40.0/24"): IPv4Address("192.0.2.2")}
        await site.lease("10.5.41.0/24", PublicIP="192.0.2.3")
        await until(lambda: len(site.host.tunnels[0].routes) == 2)
        site.host.ended()
        await until(lambda: len(site.host.tunnels) == 2 and len(site.host.tunnels[1].routes) == 2)
        assert site.host.tunnels[0].closed
        await site.client.delete(f"{PREFIX}/subnets/10.5.40.0-24")
        await until(lambda: len(site.host.tunnels[1].routes) == 1)
        assert agent.status().degraded == {}


async def test_wireguard_peers_follow_their_keys(site: Site) -> None:
    async with site.agent({"Type": "wireguard"}, dual=True):
        kinds = {name: link.kind for name, link in site.kernel.host.state().links.items()}
        key = (site.folder / "wgkey").read_text().strip()
        assert (kinds["flannel-wg"], kinds["flannel-wg-v6"]) == (Wireguard(51820, key), Wireguard(51821, key))
        await site.lease("10.5.40.0/24", BackendType="wireguard", BackendData={"PublicKey": THEIRS})
        await until(lambda: len(site.kernel.host.state().wireguard) == 1)
        other = THEIRS.replace("dGhl", "AAAA")
        await site.lease("10.5.40.0/24", BackendType="wireguard", BackendData={"PublicKey": other})
        await until(lambda: {peer.public_key for peer in site.kernel.host.state().wireguard} == {other})


async def test_wireguard_is_put_back_though_the_kernel_tells_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A peer removed, one with other networks, a stranger's, another port: each within a second, and never without need."""
    async with site.agent({"Type": "wireguard"}) as agent:
        await site.lease("10.5.40.0/24", BackendType="wireguard", BackendData={"PublicKey": THEIRS})
        await until(lambda: len(site.kernel.host.state().wireguard) == 1)
        whole = site.kernel.host.state()
        (peer,) = whole.wireguard
        device = whole.links["flannel-wg"]
        assert isinstance(device.kind, Wireguard)
        stranger = replace(peer, public_key=THEIRS.replace("dGhl", "AAAA"), allowed=())
        damages: tuple[Op, ...] = (
            DelWireguardPeer(peer),
            SetWireguardPeer(replace(peer, allowed=())),
            SetWireguardPeer(stranger),
            ChangeLink(replace(device, kind=replace(device.kind, port=7), master=None, hairpin=None)),
        )
        for damage in damages:
            site.kernel.drift(damage)
            assert site.kernel.host.state() != whole
            async with asyncio.timeout(1.5):  # a second, and something for a machine that does other things
                await until(lambda: site.kernel.host.state() == whole)
        assert agent.status().repaired == {"tunnel-peer": 3, "device-setting": 1}
        assert f"WireGuard peer {THEIRS} on flannel-wg" in caplog.text


async def test_switches_touch_only_what_is_concerned(site: Site) -> None:
    async with site.agent({"Type": "vxlan"}, dual=True):
        switches = site.kernel.host.state().sysctls
        assert switches == {
            "net/ipv4/ip_forward": "1",
            "net/ipv4/conf/eth0/rp_filter": "2",
            "net/ipv4/conf/flannel.1/rp_filter": "2",
            "net/ipv4/conf/flannel-v6.1/rp_filter": "2",
            "net/ipv6/conf/all/forwarding": "1",
            "net/ipv6/conf/eth0/accept_ra": "2",
            "net/ipv6/conf/flannel.1/accept_ra": "0",
            "net/ipv6/conf/flannel-v6.1/accept_ra": "0",
        }


async def test_an_interface_by_where_it_leads(site: Site) -> None:
    async with site.agent({"Type": "vxlan"}, can_reach=ipaddress.ip_address("192.0.2.77")) as agent:
        assert agent.status().programmed
    async with site.agent({"Type": "vxlan"}, wish=Wish(names=("eth0",), public=(IPv4Address("203.0.113.5"),))):
        page = await site.client.read(f"{PREFIX}/subnets", prefix=True)
        assert b'"PublicIP":"203.0.113.5"' in b"".join(entry.value for entry in page.kvs)


# --- iptables ---------------------------------------------------------------------------------------------------------


class Iptables:
    """What `iptables -S/-C/-A` and iptables-restore do to one chain and the jump to it."""

    def __init__(self) -> None:
        self.chain: list[str] | None = None
        self.jump = False
        self.fails = 0

    async def __call__(self, argv: Sequence[str], stdin: str) -> Outcome:
        if self.fails:
            self.fails -= 1
            return Outcome(4, "", "Another app is currently holding the xtables lock\n")
        if argv[0].endswith("-restore"):
            self.chain = [line for line in stdin.splitlines() if line.startswith("-A")]
            return Outcome(0, "", "")
        if "-S" in argv:
            return (
                Outcome(0, "\n".join(["-N FLANNEL-FWD", *self.chain]), "") if self.chain is not None else Outcome(1, "", "no")
            )
        if "-C" in argv:
            return Outcome(0 if self.jump else 1, "", "")
        self.jump = True
        return Outcome(0, "", "")


async def test_forward_rules_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podwire.agent.overlayd.rules.find_program", lambda program: f"/sbin/{program}")
    tables, health = Iptables(), Health()
    tables.fails = 1
    network = ipaddress.ip_network("10.5.0.0/16")
    task = asyncio.create_task(ForwardRules(tables, (network,), health, 0.01).run())
    try:
        await until(lambda: tables.jump and not health.degraded)
        assert tables.chain == forward_text(network).splitlines()[2:4]
        assert health.repairs == 0
        tables.chain, tables.jump = None, False
        await until(lambda: tables.jump and health.repaired["rules"] == 1)
        tables.chain = ["-A FLANNEL-FWD -j DROP", *(tables.chain or [])]
        await until(lambda: health.repaired["rules"] == 2)
        assert tables.chain == forward_text(network).splitlines()[2:4]
    finally:
        task.cancel()
        await asyncio.wait((task,))
