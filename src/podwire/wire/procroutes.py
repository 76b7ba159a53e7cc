"""The kernel's routing tables as text (/proc/net/route and /proc/net/ipv6_route): where the default route leads."""

_UP, _REJECT = 0x0001, 0x0200


def default_device_v4(text: str) -> str:
    """From /proc/net/route: the device of the default route with the lowest metric; empty where there is none.

    Columns: Iface Destination Gateway Flags RefCnt Use Metric Mask …, numbers in hexadecimal but for the metric."""
    rows = (line.split() for line in text.splitlines()[1:])
    found = [
        (int(row[6]), row[0])
        for row in rows
        if len(row) >= 8 and int(row[1], 16) == 0 and int(row[7], 16) == 0 and _usable(row[3])
    ]
    return min(found)[1] if found else ""


def default_device_v6(text: str) -> str:
    """From /proc/net/ipv6_route. Columns: destination, its length, source, its length, next hop, metric, …, flags, device."""
    rows = (line.split() for line in text.splitlines())
    found = [
        (int(row[5], 16), row[9])
        for row in rows
        if len(row) >= 10 and int(row[0], 16) == 0 and int(row[1], 16) == 0 and _usable(row[8]) and row[9] != "lo"
    ]
    return min(found)[1] if found else ""


def _usable(flags: str) -> bool:
    return int(flags, 16) & (_UP | _REJECT) == _UP
