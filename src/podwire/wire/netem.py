"""The kernel's netem queue over rtnetlink: packets that leave a device later than they were sent (linux/pkt_sched.h)."""

import struct

from podwire.wire.netlink import NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, attr, attr_str, message

_RTM_NEWQDISC, _RTM_DELQDISC = 36, 37
_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_ROOT = 0xFFFFFFFF
_HANDLE = 0x70770000
"""`7077:`, so that ours is known and another root queue is not taken away."""
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_NETEM_LATENCY64 = 10
_QOPT = struct.Struct("=IIIIII")  # latency (ticks), limit (packets), loss, gap, duplicate, jitter
_LIMIT = 100_000


def set_delay(index: int, seconds: float) -> bytes:
    """Hold back every packet that leaves the device with this index for `seconds`."""
    # netem's options are a bare struct followed by attributes, hence no `nested`.
    options = _QOPT.pack(0, _LIMIT, 0, 0, 0, 0) + attr(_TCA_NETEM_LATENCY64, struct.pack("=q", round(seconds * 1e9)))
    return message(
        _RTM_NEWQDISC,
        NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE,
        0,
        _TCMSG.pack(0, index, _HANDLE, _ROOT, 0),
        attr_str(_TCA_KIND, "netem"),
        attr(_TCA_OPTIONS, options),
    )


def remove_delay(index: int) -> bytes:
    return message(_RTM_DELQDISC, NLM_F_REQUEST, 0, _TCMSG.pack(0, index, _HANDLE, _ROOT, 0))
