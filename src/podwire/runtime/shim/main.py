"""The shim's entry: `python -I -S -c "…; main()" ROOT LISTENER_FD`. See `podwire.runtime.shimclient.start_shim`."""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys

from podwire.kernel import syscalls
from podwire.runtime.pause import write_pause
from podwire.runtime.shim.server import serve


def main() -> None:
    """Serve pods until SIGTERM; ending ends them all."""
    root, listener_fd = sys.argv[1], int(sys.argv[2])
    os.setsid()
    # Whatever else the starting process left open is not for us, and still less for containers.
    os.closerange(listener_fd + 1, os.sysconf("SC_OPEN_MAX"))
    os.set_inheritable(listener_fd, False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s shim %(levelname)s %(message)s")
    syscalls.set_process_name("podwire-shim")
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # see spawn_beside
    with contextlib.suppress(OSError, ValueError):  # two or three descriptors a pod
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    program = f"{root}/pause"
    write_pause(program, os.uname().machine)
    listener = socket.socket(fileno=listener_fd)
    # What is imported by now never becomes garbage: collecting it would only unshare pages after each fork.
    gc.collect()
    gc.freeze()
    asyncio.run(_serve_until_told(listener, program))


async def _serve_until_told(listener: socket.socket, program: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(listener, program, stop)
