"""In the place of a kube-proxy that has ended: its rules (captured, 1.20.2) go; connections and strangers' rules stay."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from proxysite import Site, proxy_site

from podwire.kernel.iptables import Flavour, IptablesClient, find_programs
from podwire.model.addr import Family
from podwire.model.nft import AddTable, Batch, TableRef
from podwire.model.ops import CommitNft
from podwire.plan.kubeproxy import NFT_TABLE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.timeout(60),
]

CAPTURED = Path(__file__).parents[1] / "cases/kubeproxy/1.20.2.iptables-save"
WEB, ENDPOINT = "10.96.0.80", "10.244.1.2"
STRANGERS = """\
*filter
:KUBE-FIREWALL - [0:0]
:MINE - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j MINE
COMMIT
"""


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with proxy_site(tmp_path) as made:
        yield made


def _rules() -> str:
    """With the one endpoint of Service web a pod of the rig."""
    return CAPTURED.read_text().replace("198.18.7.2", ENDPOINT)


async def _clean_up(site: Site) -> str:
    process = site.command("--cleanup-kube-proxy")
    _, said = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, said
    return str(said)


@pytest.mark.parametrize("flavour", Flavour)
async def test_its_rules_go_and_connections_stay(site: Site, flavour: Flavour) -> None:
    programs = find_programs(flavour)
    if programs is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    client = IptablesClient(site.rig.fds["node"], programs)
    client.restore(Family.IPV4, STRANGERS)
    before = _without_counters(client)
    client.restore(Family.IPV4, _rules())
    loop = asyncio.get_running_loop()
    with site.rig.open("p4", socket.SOCK_STREAM, WEB) as sock:
        await loop.sock_connect(sock, (WEB, 80))
        assert await site.rig.who("p4", WEB, 80, times=5) == {"p2"}
        async with site.proxy():
            assert f"iptables ({flavour}): " in await _clean_up(site)
            assert await site.rig.who("p4", WEB, 80, times=40) == {"p2", "p3", "far"}
            await loop.sock_sendall(sock, b"who?\n")
            async with asyncio.timeout(2):
                assert (await loop.sock_recv(sock, 100)).startswith(b"p2 ")
    after = _without_counters(client)
    assert [line for line in after if line not in before] == [":KUBE-MARK-DROP -", ":KUBE-MARK-MASQ -", _MARK]
    assert [line for line in before if line not in after] == []
    assert "nothing of it" in await _clean_up(site)


_MARK = "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000"


def _without_counters(client: IptablesClient) -> list[str]:
    lines = client.save(Family.IPV4).splitlines()
    return [line.partition(" [")[0] for line in lines if line.startswith((":", "-A")) and " ACCEPT" not in line]


async def test_its_nftables_go(site: Site) -> None:
    tables = [TableRef(family, NFT_TABLE) for family in Family]
    applied = await site.rig.kernel.apply((CommitNft(Batch(tuple(map(AddTable, tables)))),))
    assert applied.ok, applied.failures
    assert "removed of kube-proxy: nftables" in await _clean_up(site)
    assert not (await site.rig.kernel.observe_nft(NFT_TABLE)).tables
