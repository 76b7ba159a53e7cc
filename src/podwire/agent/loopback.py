"""The job of CNI's `loopback` plugin, which containerd before 2.0 executes for each pod beside its network's: `lo` is up."""

import ipaddress

from podwire.kernel.port import Kernel
from podwire.model.cni import KERNEL_REFUSED, CniError, CniInterface, CniIp, CniRequest, CniResult
from podwire.model.ids import NetnsName
from podwire.model.kernelstate import Device, Link
from podwire.model.ops import ChangeLink

PLUGIN_TYPE = "loopback"
DEVICE = "lo"
_ADDRESSES = ("127.0.0.1/8", "::1/128")


async def serve_loopback(kernel: Kernel, request: CniRequest, fd: int) -> CniResult | None:
    """ADD or CHECK in the namespace `fd`. Raises CniError."""
    if request.ifname != DEVICE:
        raise CniError(KERNEL_REFUSED, f"the loopback interface is {DEVICE}, not {request.ifname!r}")
    ns = NetnsName(f"loopback/{request.container}")
    kernel.attach(ns, fd)
    try:
        link = (await kernel.observe(ns)).links.get(DEVICE)
        if request.command == "CHECK":
            if link is None or not link.up:
                raise CniError(KERNEL_REFUSED, f"{DEVICE} of container {request.container} is down")
            return None
        if link is None or not link.up:
            applied = await kernel.apply((ChangeLink(Link(DEVICE, Device()), ns),))
            if applied.failures:
                raise CniError(KERNEL_REFUSED, f"{DEVICE} cannot be switched on", str(applied.failures[0]))
    finally:
        kernel.detach(ns)
    interface = CniInterface(DEVICE, "00:00:00:00:00:00", request.netns)
    return CniResult((interface,), tuple(CniIp(ipaddress.ip_interface(text), interface=0) for text in _ADDRESSES))
