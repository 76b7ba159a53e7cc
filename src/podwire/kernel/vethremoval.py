"""Removing veths without waiting for the kernel's housekeeping.

The kernel takes a link out of its namespace, with addresses and routes, in half a millisecond; then it waits some twenty for
the last readers of its memory before it answers. Who only needs the link gone looks whether it is, and lets another thread
wait. For veths alone: a tunnel's port, for one, is free only after the wait.
"""

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from podwire.kernel.rtnlsocket import RtnlSocket
from podwire.wire import rtnl, rtnlread

_AT_A_TIME = 16
"""Removals that the kernel is busy with; the next one waits until one of them is through."""

_LOOK_SECONDS = 0.0002


class VethRemoval:
    """For one kernel port; `close` waits for what is under way."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="unlink")

    def remove(self, fd: int, sock: RtnlSocket, names: Collection[str]) -> frozenset[str]:
        """Remove those of `names` that are veths of the namespace behind `fd`; `sock` is one of it. Blocks until they are out
        of sight, and returns them; what is refused, absent or no veth is left out. Raises KernelError."""
        veths = _veths(sock, names)
        if not veths:
            return veths
        own = RtnlSocket(fd)
        work = self._threads.submit(_delete, own, veths)
        left = veths
        while left:
            through = work.done()
            left = _veths(sock, left)  # behind the kernel's rtnl lock: it does not answer in the middle of a removal
            if through:
                break
            time.sleep(_LOOK_SECONDS)
        return veths - left

    def close(self) -> None:
        self._threads.shutdown()


def _delete(sock: RtnlSocket, names: Collection[str]) -> None:
    """Together, as a device group: the kernel then waits once, and not once for each."""
    try:
        if len(names) == 1:
            sock.execute([rtnl.del_link(name) for name in names])
        else:
            join = [rtnl.join_group(name, rtnl.LEAVING_GROUP) for name in names]
            sock.execute([*join, rtnl.del_group(rtnl.LEAVING_GROUP)])
    finally:
        sock.close()


def _veths(sock: RtnlSocket, names: Collection[str]) -> frozenset[str]:
    answers = sock.execute([rtnl.get_link(name) for name in names]).answers
    links = map(rtnlread.read_link, answers.values())
    return frozenset(link.name for link in links if link.kind == "veth")
