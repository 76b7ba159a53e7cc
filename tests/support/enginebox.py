"""The namespaces in which a container engine runs in tests: users, mounts and processes of its own. Run as a program.

Says its pid on standard output, waits for a line on standard input (by then somebody has written its id maps), and becomes
the parent of the box's first process, which says `ready`. That one ends with its parent, and everything in the box with it.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

from podwire.kernel import syscalls

CGROUPS = "/sys/fs/cgroup"


def main() -> None:
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    told, tell = os.pipe()
    child = os.fork()
    if child:
        print(child, flush=True)
        os.write(tell, b"1")
        os.waitpid(child, 0)
        return
    os.read(told, 1)
    syscalls.mount("", "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.mount("proc", "/proc", "proc")
    syscalls.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    os.mkdir("/run/netns")
    _hide_cgroups()
    print("ready", flush=True)
    while True:
        signal.sigwait({signal.SIGCHLD})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _hide_cgroups() -> None:
    """The engine shall leave the machine's cgroups alone: containers run without any here. It finds directories where cgroups
    are by /proc, but can make nothing in them; runc bears with that in a user namespace."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    own = [line.split(":", 2)[2].lstrip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    syscalls.mount("tmpfs", CGROUPS, "tmpfs", 0, "mode=755")
    for hierarchy in mounts:
        if hierarchy.startswith(f"{CGROUPS}/"):
            for cgroup in own:
                os.makedirs(os.path.join(hierarchy, cgroup), exist_ok=True)
    syscalls.mount("", CGROUPS, flags=syscalls.MS_REMOUNT | syscalls.MS_RDONLY)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    main()
