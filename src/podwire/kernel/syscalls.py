"""System calls that Python 3.11 has no name for: namespaces, mounts, prctl, host name.

Only `ctypes`, `errno` and `os` are imported, so that the small processes (shim, boot) can use it with `python -I -S`.
Every function raises OSError whose text says which call failed on what, and for EPERM and ENOSYS what to do about it.
"""

import ctypes
import errno
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_CLONE_NAMES = {
    CLONE_NEWUSER: "user",
    CLONE_NEWNET: "network",
    CLONE_NEWNS: "mount",
    CLONE_NEWPID: "PID",
    CLONE_NEWUTS: "UTS",
    CLONE_NEWIPC: "IPC",
    CLONE_NEWCGROUP: "cgroup",
}

_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "armv7l": 218, "ppc64le": 203, "s390x": 217}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
_libc.syscall.restype = ctypes.c_long


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (CLONE_NEW…). CLONE_NEWUSER needs a process with a single thread."""
    if _libc.unshare(flags) != 0:
        code = ctypes.get_errno()
        raise _error(code, f"new {_describe(flags)} namespace", advice=namespace_advice(code))


def setns(fd: int, nstype: int = 0) -> None:
    """Move the calling thread into the namespace behind `fd`, or with a pidfd into all those named in `nstype`."""
    if _libc.setns(fd, nstype) != 0:
        raise _error(ctypes.get_errno(), f"entering the {_describe(nstype)} namespace behind descriptor {fd}")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); empty strings stand for NULL."""
    if _libc.mount(_text(source), os.fsencode(target), _text(fstype), flags, _text(data)) != 0:
        raise _error(ctypes.get_errno(), f"mounting {source or fstype or 'a new propagation'} on {target}")


def umount2(target: str, flags: int = 0) -> None:
    if _libc.umount2(os.fsencode(target), flags) != 0:
        raise _error(ctypes.get_errno(), f"unmounting {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2), for which libc has no wrapper."""
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise _error(errno.ENOSYS, f"pivot_root on {os.uname().machine}")
    if _libc.syscall(ctypes.c_long(number), os.fsencode(new_root), os.fsencode(put_old)) != 0:
        raise _error(ctypes.get_errno(), f"changing the root to {new_root}")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) with integer arguments (PR_SET_NAME: see `set_process_name`)."""
    result: int = _libc.prctl(option, arg2, arg3, arg4, arg5)
    if result < 0:
        raise _error(ctypes.get_errno(), f"prctl option {option}")
    return result


def set_process_name(name: str) -> None:
    """The calling thread's name as `ps` shows it (comm, 15 bytes)."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def sethostname(name: str) -> None:
    raw = name.encode()
    if _libc.sethostname(raw, len(raw)) != 0:
        raise _error(ctypes.get_errno(), f"setting the host name {name}")


def release_memory() -> None:
    """Give free memory back to the kernel now, where the C library can (glibc's malloc_trim): after much work that is not done
    again."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGE = -1, -3, 1 << 17


def return_large_blocks() -> None:
    """Have every large block of memory come from the kernel and go back to it, where the C library can be told (glibc's
    mallopt). Left alone, it takes one that was freed for a sign that more will come, and keeps the next ones."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)


def namespace_advice(code: int) -> str:
    """What a user can do when namespaces are refused with errno `code`; empty where nothing is known."""
    if code == errno.ENOSYS or code == errno.EINVAL:
        return "this kernel was built without that kind of namespace"
    if code == errno.ENOSPC:
        return "raise the limits in /proc/sys/user/max_*_namespaces"
    if code not in (errno.EPERM, errno.EACCES):
        return ""
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "AppArmor forbids user namespaces here: run `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        return "user namespaces are switched off here: run `sudo sysctl kernel.unprivileged_userns_clone=1`"
    if _sysctl("user/max_user_namespaces") == "0":
        return "user namespaces are switched off here: run `sudo sysctl user.max_user_namespaces=10000`"
    return "a container runtime or security module forbids it: allow the unshare system call and user namespaces"


def _describe(flags: int) -> str:
    return "+".join(name for bit, name in _CLONE_NAMES.items() if flags & bit) or "unnamed"


def _text(value: str) -> bytes | None:
    return os.fsencode(value) if value else None


def _sysctl(key: str) -> str:
    try:
        with open(f"/proc/sys/{key}") as file:
            return file.read().strip()
    except OSError:
        return ""


def _error(code: int, what: str, advice: str = "") -> OSError:
    # OSError picks its subclass (PermissionError, …) by the errno, so callers can be specific without parsing.
    return OSError(code, f"{what}: {os.strerror(code)}" + (f" ({advice})" if advice else ""))
