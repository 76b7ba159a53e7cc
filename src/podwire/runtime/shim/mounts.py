"""A container's view of the file system: the machine's own, with the pod's files and volumes mounted over it.

Runs in the forked child, in a mount namespace of its own. Nothing is ever created on the machine's file system: where a
mount point is missing, the nearest directory that exists is replaced, in this namespace, by a tmpfs that holds a bind of each
of its entries, and the mount point is made in that. So any path can be mounted on, also as an ordinary user, also in `/`.
"""

import contextlib
import os
import stat

from podwire.kernel import syscalls
from podwire.runtime.shim.messages import Mount

_LOCKED = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC  # equal to the ST_ flags of statvfs


def enter_filesystem(mounts: tuple[Mount, ...], stage: str, directories: tuple[str, ...] = ()) -> None:
    """Give this process its own mount namespace with `mounts` (parents first) and make `directories` exist in it.

    `stage`: an empty directory to build in. /proc is mounted afresh for the PID namespace where the kernel lets us."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    with contextlib.suppress(OSError):  # refused where parts of /proc are masked: then the surrounding one stays
        syscalls.mount("proc", "/proc", "proc", _LOCKED)
    tree = _Tree(stage)
    ordered = sorted(mounts, key=lambda mount: mount.target.count("/"))
    # By descriptor: a volume mounted on /tmp may hide the sources of those that follow.
    sources = [os.open(mount.source, os.O_PATH | os.O_CLOEXEC) for mount in ordered]
    for mount, fd in zip(ordered, sources, strict=True):
        tree.mount(fd, mount)
    for directory in directories:
        tree.make(os.path.realpath(directory), is_directory=True)
    tree.finish()


class _Tree:
    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._root = ""  # prefix of the new root, once "/" itself had to be replaced
        self._opened: set[str] = set()  # replaced by a tmpfs: entries may be made in exactly these
        self._ours: list[str] = []  # mounted or made by us: anything may be made below
        self._count = 0

    def mount(self, fd: int, mount: Mount) -> None:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        path = os.path.realpath(mount.target)
        self.make(path, is_directory)
        place = self._root + path
        syscalls.mount(f"/proc/self/fd/{fd}", place, "", syscalls.MS_BIND | syscalls.MS_REC)
        if mount.read_only:
            kept = os.statvfs(place).f_flag & _LOCKED
            syscalls.mount("", place, "", syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | kept)
        if is_directory:
            self._ours.append(path)

    def make(self, path: str, is_directory: bool) -> None:
        """See to it that a file or directory is at `path` (absolute, without symlinks)."""
        place = self._root + path
        if os.path.lexists(place or "/"):
            if os.path.isdir(place or "/") != is_directory:
                kind = "a directory" if not is_directory else "not a directory"
                raise OSError(f"{path} cannot be mounted on: it is {kind} on this machine")
            return
        parent = os.path.dirname(path)
        self.make(parent, is_directory=True)
        if not self._may_create_in(parent):
            self._open(parent)
        place = self._root + path
        if is_directory:
            os.mkdir(place)
            self._ours.append(path)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))

    def finish(self) -> None:
        """Change to the new root, if there is one."""
        if self._root:
            os.chdir(self._root)
            syscalls.pivot_root(".", ".")
            syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")

    def _may_create_in(self, directory: str) -> bool:
        return directory in self._opened or any(directory == ours or directory.startswith(f"{ours}/") for ours in self._ours)

    def _open(self, directory: str) -> None:
        """Replace `directory` by a tmpfs with the same entries."""
        if self._count == 0:
            syscalls.mount("tmpfs", self._stage, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755")
        place = f"{self._stage}/{self._count}"
        self._count += 1
        os.mkdir(place)
        syscalls.mount("tmpfs", place, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755")
        origin = self._root + directory if directory != "/" else self._root or "/"
        with os.scandir(origin) as entries:
            # First the entry that holds the stage, lest it be copied with all that the stage holds by then.
            prefix = directory.rstrip("/")
            ordered = sorted(entries, key=lambda entry: not f"{self._stage}/".startswith(f"{prefix}/{entry.name}/"))
        for entry in ordered:
            _bind_entry(entry, f"{place}/{entry.name}")
        if directory == "/":
            self._root = place
        else:
            syscalls.mount(place, self._root + directory, "", syscalls.MS_MOVE)
        self._opened.add(directory)


def _bind_entry(entry: os.DirEntry[str], place: str) -> None:
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), place)
    elif entry.is_dir(follow_symlinks=False):
        os.mkdir(place)
        syscalls.mount(entry.path, place, "", syscalls.MS_BIND | syscalls.MS_REC)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        syscalls.mount(entry.path, place, "", syscalls.MS_BIND)
