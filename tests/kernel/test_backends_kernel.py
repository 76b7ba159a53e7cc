"""Back ends on the real kernel: hosts with agents, packets between their pods. (ipip and wireguard: tests/vm.)"""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from overlayrig import carries, config_text, overlay_hosts, until

from podwire.model.addr import Family

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "IPv6", "nftables")]

DUAL = (Family.IPV4, Family.IPV6)
BACKENDS: dict[str, tuple[dict[str, Any], tuple[Family, ...], int]] = {
    "vxlan": ({"Type": "vxlan"}, DUAL, 1430),
    "vxlan-options": ({"Type": "vxlan", "VNI": 77, "Port": 4789, "GBP": True, "MTU": 1400}, DUAL, 1330),
    "vxlan-direct": ({"Type": "vxlan", "DirectRouting": True}, DUAL, 1430),
    "host-gw": ({"Type": "host-gw"}, DUAL, 1500),
    "udp": ({"Type": "udp"}, (Family.IPV4,), 1472),
}


@pytest.mark.parametrize(
    "name", [n if n != "udp" else pytest.param(n, marks=pytest.mark.needs("TUN devices")) for n in BACKENDS]
)
async def test_a_back_end_carries_tcp_and_udp_between_pods(tmp_path: Path, name: str) -> None:
    backend, families, mtu = BACKENDS[name]
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(overlay_hosts(tmp_path, config_text(backend, families)))
        first, second = [await stack.enter_async_context(host.running()) for host in (one, two)]
        await until(lambda: first.status().peers == second.status().peers == 1 and first.idle and second.idle)
        assert one.mtu == mtu
        await one.add_pod()
        await two.add_pod()
        for family in families:
            await carries(one, two, family)
