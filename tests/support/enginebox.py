"""The namespaces in which a container engine runs in tests: users, mounts and processes of its own. Run as a program.

Says its pid on standard output, waits for a line on standard input (by then somebody has written its id maps), and becomes
the parent of the box's first process, which says `ready`. That one ends with its parent, and everything in the box with it.
"""

import contextlib
import os
import signal
import sys

from podwire.kernel import syscalls


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
    # The engine shall not find the machine's cgroups: containers run without any here, and crun dislikes some layouts.
    for directory in ("/run", "/sys/fs/cgroup"):
        syscalls.mount("tmpfs", directory, "tmpfs", 0, "mode=755")
    os.mkdir("/run/netns")
    print("ready", flush=True)
    while True:
        signal.sigwait({signal.SIGCHLD})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    main()
