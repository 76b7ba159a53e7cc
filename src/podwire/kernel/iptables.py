"""iptables through its own programs, in the flavour that the host uses, inside a network namespace. Blocking: call it off the
loop (`netns.off_loop`).

The two flavours (legacy: ip_tables in the kernel; nft: nf_tables) do not see each other's rules, and mixing them gives
neither. So the flavour is that of what is there already (kubelet leaves a chain as a hint), as compat.md D5 has it.
"""

import ctypes
import enum
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from podwire.kernel.commands import find_program
from podwire.kernel.netns import netns_inode, run_in_netns
from podwire.kernel.port import KernelError
from podwire.model.addr import Family
from podwire.model.errors import Unsupported

_HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
"""Chains in the mangle table by which kubelet says which flavour it uses."""

_NOT_IN_KERNEL = (f"initialize nft: {os.strerror(errno.EPROTONOSUPPORT)}", "Table does not exist (do you need to insmod?)")
"""How the programs (1.8) say that the kernel has no nf_tables, or not this table."""

_LOCK = "/run/xtables.lock"
_WAIT_S = "5"
_TIMEOUT_S = 120
_SHOWN = 600

_SOCKETS: Final = {
    Family.IPV4: (socket.AF_INET, socket.SOL_IP),
    Family.IPV6: (socket.AF_INET6, socket.IPPROTO_IPV6),
}
_SO_GET_INFO = 64
"""IPT_SO_GET_INFO and IP6T_SO_GET_INFO (linux/netfilter_ipv4/ip_tables.h)."""
_GETINFO = struct.Struct("@32sI5I5III")


class Flavour(enum.StrEnum):
    LEGACY = "legacy"
    NFT = "nft"


@dataclass(frozen=True, slots=True)
class Programs:
    """Paths of one flavour's programs, by family; a family without is not programmed."""

    flavour: Flavour
    save: Mapping[Family, str]
    restore: Mapping[Family, str]


def find_programs(flavour: Flavour) -> Programs | None:
    """That flavour's programs on this machine; None if it has none for IPv4."""
    save, restore = {}, {}
    for family, name in ((Family.IPV4, "iptables"), (Family.IPV6, "ip6tables")):
        found = [find_program(f"{name}-{flavour}-{what}") for what in ("save", "restore")]
        if all(found):
            save[family], restore[family] = found
    return Programs(flavour, save, restore) if Family.IPV4 in save else None


def choose_programs(netns_fd: int, wanted: Flavour | None = None) -> Programs:
    """The programs of the flavour in use in the namespace: where kubelet left its hint, else where there are more rules, else
    nft. Raises Unsupported, with advice, where the machine has none."""
    found = {f: programs for f in Flavour if (wanted in (None, f)) and (programs := find_programs(f)) is not None}
    if not found:
        name = f"iptables ({wanted})" if wanted else "iptables"
        raise Unsupported(name, "install the package iptables, or use --proxy-mode nftables")
    if len(found) == 1:
        return next(iter(found.values()))
    rules: dict[Flavour, int] = {}
    for flavour, programs in found.items():
        try:
            text = "".join(IptablesClient(netns_fd, programs).save(family) for family in programs.save)
        except NotInKernel:
            continue
        if any(f":{hint} " in text for hint in _HINTS):
            return programs
        rules[flavour] = sum(line.startswith("-A ") for line in text.splitlines())
    if not rules:
        raise Unsupported("iptables, of either flavour, in this kernel", "use --proxy-mode nftables")
    return found[max(rules, key=lambda flavour: (rules[flavour], flavour is Flavour.NFT))]


class NotInKernel(KernelError):
    """The program is there, but the kernel lacks what it works with; so there are none of its rules."""


class TooLarge(KernelError):
    """The nft flavour sends one message, which must fit the socket's buffer; only the machine's root may make that larger."""


class IptablesClient:
    """One namespace's iptables. Raises KernelError with the program's own words."""

    def __init__(self, netns_fd: int, programs: Programs) -> None:
        self._fd, self._programs = netns_fd, programs
        # The legacy programs of a machine keep each other away by a file; in a namespace of our own we are alone.
        own = os.stat("/proc/self/ns/net").st_ino == netns_inode(netns_fd)
        self._machines_lock = own and os.access(_LOCK if os.path.exists(_LOCK) else os.path.dirname(_LOCK), os.W_OK)

    @property
    def flavour(self) -> Flavour:
        return self._programs.flavour

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(self._programs.save)

    def save(self, family: Family) -> str:
        """All tables' rules. Tables that are not in use are not loaded by asking."""
        return self._run([self._programs.save[family]], "")

    def count(self, family: Family, table: str) -> str:
        """One table's rules, each with its counters in front: `[packets:bytes] -A …`."""
        return self._run([self._programs.save[family], "-c", "-t", table], "")

    def restore(self, family: Family, text: str) -> None:
        """Carry out a text: all of a table's part or nothing. What it does not name stays. Raises TooLarge where the kernel
        takes no text of that size from this user."""
        wait = ["-w", _WAIT_S] if self.flavour is Flavour.LEGACY else []
        self._run([self._programs.restore[family], "--noflush", *wait], text)

    def fingerprint(self) -> bytes:
        """Changes whenever somebody makes the legacy tables larger or smaller; b"" for nft, whose changes the kernel announces.

        The kernel says nothing when legacy rules change; asking for their number and size costs microseconds."""
        if self.flavour is Flavour.NFT:
            return b""
        return run_in_netns(self._fd, lambda: b"".join(_info(family, table) for family in self.families for table in _TABLES))

    def _run(self, command: Sequence[str], text: str) -> str:
        env, lock = dict(os.environ), -1
        if not self._machines_lock:
            lock = os.memfd_create("xtables.lock")
            env["XTABLES_LOCKFILE"] = f"/proc/self/fd/{lock}"

        def run() -> subprocess.CompletedProcess[str]:
            kept = () if lock < 0 else (lock,)
            return subprocess.run(
                command, input=text, capture_output=True, text=True, check=False, env=env, timeout=_TIMEOUT_S, pass_fds=kept
            )

        name = os.path.basename(command[0])
        try:
            done = run_in_netns(self._fd, run)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(f"{name} cannot be run: {error}", errno.EIO) from error
        finally:
            if lock >= 0:
                os.close(lock)
        if done.returncode:
            words = (done.stderr or done.stdout).strip()[:_SHOWN]
            if os.strerror(errno.EMSGSIZE) in words:
                raise TooLarge(f"{name}: {words}", errno.EMSGSIZE)
            if any(hint in words for hint in _NOT_IN_KERNEL):
                raise NotInKernel(f"{name}: {words}", errno.EPROTONOSUPPORT)
            raise KernelError(f"{name} failed (status {done.returncode}): {words}", errno.EINVAL)
        return done.stdout


_TABLES = (b"nat", b"filter")


def _info(family: Family, table: bytes) -> bytes:
    """struct ipt_getinfo without the name: entry points, number and size of the rules."""
    domain, level = _SOCKETS[family]
    with socket.socket(domain, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        buffer = _GETINFO.pack(table, *(0,) * 13)
        try:
            return _getsockopt(sock, level, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.ENOPROTOOPT):
                return b"-"  # the table is not loaded
            raise


def _getsockopt(sock: socket.socket, level: int, buffer: bytes) -> bytes:
    """getsockopt that hands a value in, which Python's does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    value = ctypes.create_string_buffer(buffer, len(buffer))
    size = ctypes.c_uint32(len(buffer))
    if libc.getsockopt(sock.fileno(), level, _SO_GET_INFO, value, ctypes.byref(size)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return value.raw[32 : size.value]
