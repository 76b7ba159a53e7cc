"""What an overlay agent does when the configuration, or the interface to the other hosts, changes while it runs."""

import ipaddress
import json
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from overlaysite import PREFIX, Site, until

from podwire.agent.subnets.port import Holding
from podwire.model.kernelstate import Address, Device, Link, Vxlan
from podwire.model.ops import AddAddress, ChangeLink, DelAddress
from podwire.plan.leases import decode_attrs
from podwire.plan.underlay import Wish

VXLAN: dict[str, Any] = {"Type": "vxlan"}
VTEP = {"BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:02"}}
OLD, NEW = (Address("eth0", ipaddress.ip_interface(text)) for text in ("192.0.2.1/24", "192.0.2.77/24"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def configure(site: Site, **document: Any) -> None:
    await site.client.put(f"{PREFIX}/config", json.dumps({"Network": "10.5.0.0/16"} | document).encode())


def tunnel(site: Site) -> Vxlan | None:
    link = site.kernel.host.state().links.get("flannel.1")
    return link.kind if link is not None and isinstance(link.kind, Vxlan) else None


def leases(site: Site) -> dict[str, Any]:
    kept = {key.rpartition("/")[2]: kv for key, kv in site.etcd.keys.items() if "/subnets/" in key}
    return {name: decode_attrs(kv.value) for name, kv in kept.items()}


async def test_another_address_is_told_and_the_device_follows(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The subnet stays; the peers' entries stand on the device that was made anew."""
    await site.lease("10.5.40.0/24", **VTEP)
    async with site.agent(VXLAN) as agent:
        before, key = site.env, site.own_key.rpartition("/")[2]
        held = site.etcd.keys[site.own_key].lease
        site.kernel.drift(DelAddress(OLD), AddAddress(NEW))
        await until(lambda: leases(site)[key].public_ip == NEW.interface.ip)
        await until(lambda: agent.idle and (kind := tunnel(site)) is not None and kind.local == NEW.interface.ip)
        state = site.kernel.host.state()
        assert ("10.5.40.0/24", "flannel.1") in site.ways
        assert {str(entry.dst) for entry in state.fdb} == {"192.0.2.2"}
        assert site.etcd.keys[site.own_key].lease == held, "it is the same lease, with what is left of its time"
        assert len(leases(site)) == 2
        assert site.env == before
        assert agent.status().obstacles == ()
        assert agent.status().repaired == {}
        assert "set up anew: addresses 192.0.2.77/24 instead of 192.0.2.1/24" in caplog.text


async def test_a_pod_network_around_the_own_address_is_warned_of(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with site.agent(VXLAN) as agent:
        assert "own address" not in caplog.text
        site.kernel.drift(DelAddress(OLD), AddAddress(Address("eth0", ipaddress.ip_interface("10.5.200.1/24"))))
        await until(lambda: "the pod network 10.5.0.0/16 contains this host's own address 10.5.200.1" in caplog.text)
        site.kernel.drift(ChangeLink(_eth0(1400)))
        await until(lambda: site.env["FLANNEL_MTU"] == "1350" and agent.idle)
        assert caplog.text.count("own address") == 1, "another MTU is no reason to say it again"


async def test_an_address_more_is_no_reason_to_move(site: Site) -> None:
    async with site.agent(VXLAN) as agent:
        site.kernel.drift(AddAddress(Address("eth0", ipaddress.ip_interface("192.0.2.0/24"))), ChangeLink(_eth0(1400)))
        await until(lambda: site.env["FLANNEL_MTU"] == "1350" and agent.idle)
        assert leases(site)[site.own_key.rpartition("/")[2]].public_ip == OLD.interface.ip


async def test_another_mtu_reaches_the_device_and_the_file(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with site.agent(VXLAN, docker_file=site.folder / "docker.env") as agent:
        assert site.env["FLANNEL_MTU"] == "1450"
        site.kernel.drift(ChangeLink(_eth0(9000)))
        await until(lambda: site.env["FLANNEL_MTU"] == "8950" and agent.idle)
        assert site.kernel.host.state().links["flannel.1"].mtu == 8950
        assert "--mtu=8950" in (site.folder / "docker.env").read_text()
        assert "pods that are made from now on have an MTU of 8950, not 1450" in caplog.text


def _eth0(mtu: int) -> Link:
    return Link("eth0", Device(), mtu=mtu)


async def test_an_interface_without_address_is_waited_for(site: Site) -> None:
    """A DHCP client that is slow: the host goes on with what it had, and says so."""
    async with site.agent(VXLAN) as agent:
        site.kernel.drift(DelAddress(OLD))
        await until(lambda: "interface" in agent.status().degraded)
        assert "no interface with an IPv4 address fits the default route" in agent.status().degraded["interface"]
        assert tunnel(site) is not None
        site.kernel.drift(AddAddress(OLD))
        await until(lambda: not agent.status().degraded)


async def test_a_public_address_that_was_given_stays(site: Site) -> None:
    async with site.agent(VXLAN, wish=Wish(public=(IPv4Address("203.0.113.5"),))) as agent:
        site.kernel.drift(DelAddress(OLD), AddAddress(NEW))
        await until(lambda: agent.idle and (kind := tunnel(site)) is not None and kind.local == NEW.interface.ip)
        assert {attrs.public_ip for attrs in leases(site).values()} == {IPv4Address("203.0.113.5")}


async def test_another_back_end_takes_the_place_of_the_first(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    await site.lease("10.5.40.0/24", **VTEP)
    await site.lease("10.5.41.0/24", PublicIP="192.0.2.3", BackendType="host-gw")
    async with site.agent(VXLAN) as agent:
        await until(lambda: site.ways == {("10.5.40.0/24", "flannel.1")})
        before = site.env
        await configure(site, Backend={"Type": "host-gw"})
        await until(lambda: site.ways == {("10.5.41.0/24", "eth0")} and agent.idle)
        assert tunnel(site) is None
        assert site.env == before | {"FLANNEL_MTU": "1500"}
        await until(lambda: leases(site)[site.own_key.rpartition("/")[2]].backend_type == "host-gw")
        assert (agent.status().backend, agent.status().refused) == (
            "host-gw",
            {"10.5.40.0-24": "its backend is vxlan, not host-gw"},
        )
        assert "the network configuration has changed (back end host-gw)" in caplog.text
        await configure(site, Backend={"Type": "udp"})
        await until(lambda: bool(site.host.tunnels) and agent.idle)
        await until(lambda: len(site.host.tunnels[0].routes) == 2)
        await configure(site, Backend=VXLAN)
        await until(lambda: site.ways == {("10.5.40.0/24", "flannel.1")} and agent.idle)
        assert site.host.tunnels[0].closed
        assert "flannel0" not in site.kernel.host.state().links


async def test_a_wider_network_is_followed(site: Site) -> None:
    async with site.agent(VXLAN, masquerade=True) as agent:
        await configure(site, Network="10.4.0.0/15", SubnetLen=24, Backend=VXLAN)
        await until(lambda: site.env["FLANNEL_NETWORK"] == "10.4.0.0/15" and agent.idle)
        assert site.env["FLANNEL_SUBNET"].startswith("10.5.")


async def test_a_network_without_room_for_the_lease_waits(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, not followed; until the lease is lost anyway."""
    async with site.agent(VXLAN) as agent:
        before = site.env
        await configure(site, Network="10.9.0.0/16", Backend={"Type": "host-gw"})
        await until(lambda: "restart needed" in agent.status().degraded.get("configuration", ""))
        assert "restart needed" in caplog.text
        assert any("restart needed" in line for line in agent.status().obstacles)
        assert site.env == before
        assert agent.status().holding is Holding.HELD
        await site.client.delete(site.own_key)
        await until(lambda: site.env["FLANNEL_SUBNET"].startswith("10.9.") and tunnel(site) is None and agent.idle)
        assert (site.env["FLANNEL_NETWORK"], agent.status().backend) == ("10.9.0.0/16", "host-gw")
        assert agent.status().degraded == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b'{"Network":"10.5.0.0/16","Backend":{"Type":"ipsec"}}', "podwire has no back end 'ipsec'"),
        (b'{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard","PSK":"x"}}', "cannot be used here: backend wireguard: PSK"),
    ],
)
async def test_what_cannot_be_used_is_said_and_the_former_goes_on(site: Site, text: bytes, words: str) -> None:
    async with site.agent(VXLAN) as agent:
        await site.client.put(f"{PREFIX}/config", text)
        await until(lambda: words in agent.status().degraded.get("configuration", ""))
        site.kernel.drift(ChangeLink(_eth0(1400)))
        await until(lambda: site.env["FLANNEL_MTU"] == "1350")
        assert words in agent.status().degraded["configuration"], "other changes are followed, and do not hide it"
        await configure(site, Backend=VXLAN)
        await until(lambda: not agent.status().degraded)


async def test_a_blackhole_for_the_own_subnet(site: Site) -> None:
    async with site.agent(VXLAN, dual=True, blackhole=True):
        routes = site.kernel.host.state().routes
        holes = {str(route.dst) for route in routes if route.blackhole and route.metric > 1_000_000}
        assert holes == {str(ipaddress.ip_interface(site.env[f"FLANNEL_{f}SUBNET"]).network) for f in ("", "IPV6_")}
    async with site.agent(VXLAN, dual=True):
        assert not any(route.blackhole for route in site.kernel.host.state().routes)
