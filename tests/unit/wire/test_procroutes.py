"""The kernel's routing tables as text, as this kernel (6.18) writes them."""

from podwire.wire.procroutes import default_device_v4, default_device_v6

HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
V4 = (
    HEAD
    + "wlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
    + "eth0\t00000000\t0102000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
    + "tun0\t00000000\t0102000A\t0003\t0\t0\t0\t00000080\t0\t0\t0\n"
    + "eth1\t0038A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
)
ZERO, ADDRESS = "0" * 32, "20010db8" + "0" * 24
V6 = (
    f"{ADDRESS} 40 {ZERO} 00 {ZERO} 00000100 00000001 00000000 00000001     eth1\n"
    f"{ZERO} 00 {ZERO} 00 {ADDRESS} 00000400 00000001 00000000 00000003     eth1\n"
    f"{ZERO} 00 {ZERO} 00 {ZERO} ffffffff 00000001 00000000 00200200       lo\n"
)


def test_the_default_route_with_the_lowest_metric() -> None:
    assert default_device_v4(V4) == "eth0"
    assert default_device_v4(HEAD) == ""
    assert default_device_v4("") == ""


def test_the_unreachable_default_of_ipv6_is_none() -> None:
    assert default_device_v6(V6) == "eth1"
    assert default_device_v6(V6.splitlines()[2]) == ""
