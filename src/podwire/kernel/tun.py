"""TUN devices: made through /dev/net/tun, read and written as a file of IP packets."""

import errno
import fcntl
import os
import struct

from podwire.kernel.netns import run_in_netns
from podwire.model.errors import Unsupported

TUN_DEVICE = "/dev/net/tun"

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_IFREQ = struct.Struct("16sH22x")


def make_tun(netns_fd: int, name: str) -> None:
    """A persistent TUN device in the namespace. Raises OSError (EBUSY, EINVAL: the name is taken), Unsupported without TUN."""

    def make() -> None:
        if _exists(name):
            # TUNSETIFF would attach to a TUN device of that name and call it success.
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        fd = _open(name)
        try:
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        finally:
            os.close(fd)

    run_in_netns(netns_fd, make)


def attach_tun(netns_fd: int, name: str) -> int:
    """A non-blocking descriptor whose reads and writes are the device's packets. Raises OSError (EBUSY) if one is attached."""

    def attach() -> int:
        fd = _open(name)
        os.set_blocking(fd, False)
        return fd

    return run_in_netns(netns_fd, attach)


def _open(name: str) -> int:
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError) as error:
        raise Unsupported(f"TUN ({TUN_DEVICE}: {error.strerror})", "run `sudo modprobe tun` and allow access to it") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


def _exists(name: str) -> bool:
    with open("/proc/thread-self/net/dev") as file:
        return any(line.lstrip().startswith(f"{name}:") for line in file)
