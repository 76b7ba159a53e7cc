"""What `podwire proxy` leaves behind when its mode changes and when it is told to clean up: nothing, or an exit status that
says so."""

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from proxysite import Site, proxy_site, until
from servicerig import neighbour_reaches

from podwire.agent.localnet import LOCALNET
from podwire.kernel.iptables import Flavour, IptablesClient, find_programs
from podwire.kernel.sysctl import read_sysctls, write_sysctls
from podwire.model.addr import Family
from podwire.plan.iptables_rules import PREFIX

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.timeout(90),
]


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    if find_programs(Flavour.NFT) is None:
        pytest.skip("iptables (nft) is not installed")
    async with proxy_site(tmp_path) as made:
        yield made


def localnet(site: Site) -> str:
    return read_sysctls(site.rig.fds["node"], (LOCALNET,))[LOCALNET]


def chains(site: Site) -> int:
    programs = find_programs(Flavour.NFT)
    assert programs is not None
    return IptablesClient(site.rig.fds["node"], programs).save(Family.IPV4).count(f":{PREFIX}")


async def switched(site: Site, *, on: bool) -> None:
    async def so() -> bool:
        return (localnet(site) != "0") is on

    await until(so)


async def test_nobody_else_reaches_127_0_0_1_in_any_mode_or_after_it(site: Site) -> None:
    """CVE-2020-8558, with a real frame of a neighbour. Its flow is forgotten in between: who was let in once, stays."""
    with site.rig.open("node", socket.SOCK_DGRAM, "127.0.0.1", 7000) as listener:

        async def reached() -> bool:
            await site.rig.kernel.forget_flows(lambda flow: True)
            return await neighbour_reaches(site.rig, listener)

        for mode in ("iptables", "nftables", "iptables"):
            async with site.proxy("--proxy-mode", mode):
                await switched(site, on=mode == "iptables")
                assert not await reached()
        status, said = await site.outcome(site.command("--cleanup"))
        assert status == 0, said
        assert (localnet(site), chains(site)) == ("0", 0)
        assert not await reached()


async def test_who_switched_127_0_0_1_on_before_us_finds_it_on(site: Site) -> None:
    write_sysctls(site.rig.fds["node"], {LOCALNET: "1"})
    async with site.proxy("--proxy-mode", "iptables"):
        pass
    status, said = await site.outcome(site.command("--cleanup"))
    assert (status, localnet(site), chains(site)) == (0, "1", 0), said
    assert "the API says for 5 min more that Services are programmed here" in said, "it was not told where the API is"


async def test_127_0_0_1_is_switched_on_again_when_somebody_switches_it_off(site: Site) -> None:
    async with site.proxy("--proxy-mode", "iptables") as process:
        await switched(site, on=True)
        write_sysctls(site.rig.fds["node"], {LOCALNET: "0"})
        await switched(site, on=True)
        assert await site.metric('podwire_proxy_repaired_total{kind="sysctl"}') == 1
        _, said = await site.end(process)
        assert f"put back what somebody changed: {LOCALNET} was 0" in said


async def test_a_clean_up_that_fails_says_so(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with site.proxy("--proxy-mode", "iptables"):
        pass
    held = chains(site)
    assert held
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("iptables", "ip6tables"):
        for flavour in Flavour:
            program = programs / f"{name}-{flavour}-restore"
            program.write_text("#!/bin/sh\necho no memory >&2\nexit 4\n")
            program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        status, said = await site.outcome(site.command("--cleanup"))
        assert (status, chains(site)) == (1, held), said
        assert "rules of Services are still there, of iptables (nft) (iptables-nft-restore failed (status 4): no memory" in said
        async with site.proxy() as process:  # one that serves goes on serving, and tries again

            async def said_so() -> bool:
                return await site.metric('podwire_proxy_degraded{subject="other modes"}') == 1

            await until(said_so)
            _, said = await site.end(process)
        assert "rules of another proxy mode stay for now: rules of Services are still there" in said
    status, said = await site.outcome(site.command("--cleanup"))
    assert (status, chains(site)) == (0, 0), said
