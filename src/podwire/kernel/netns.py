"""Network namespaces as descriptors. Nothing here moves the process: a thread enters, works and ends."""

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from podwire.kernel import syscalls

T = TypeVar("T")

_SELF = "/proc/thread-self/ns/net"


def create_netns() -> int:
    """A new network namespace (`lo` down, nothing else), owned by the caller's user namespace. Blocks ~1 ms.

    Returns a descriptor (close-on-exec); the namespace lives until the last descriptor, process and device of it is gone."""

    def create() -> int:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        return os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)

    return _join(create)


def current_netns() -> int:
    """A descriptor of the namespace that the calling thread is in."""
    return os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)


def open_netns(path: str) -> int:
    """A descriptor of the namespace at `path` (`/proc/<pid>/ns/net`, `/run/netns/<name>`)."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def netns_inode(fd: int) -> int:
    """The namespace's identity: two descriptors are of one namespace exactly if this is equal."""
    return os.fstat(fd).st_ino


def run_in_netns(fd: int, fn: Callable[[], T]) -> T:
    """Call `fn` in a short-lived thread that has entered `fd`'s namespace, and wait for it (blocks the caller).

    For the loop use `in_netns`. Raises what `fn` raises, or OSError if the namespace cannot be entered."""
    return _join(_entered(fd, fn))


async def in_netns(fd: int, fn: Callable[[], T]) -> T:
    """Call `fn` in a short-lived thread that has entered `fd`'s namespace; typically to open a socket there.

    If the waiting task is cancelled and the result has a `close()`, it is closed: no socket is left behind."""
    return await off_loop(_entered(fd, fn))


async def off_loop(fn: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but in a thread of its own that ends after it: it may change its namespaces."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            _close(result)
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # no error: the result is fn's

    def work() -> None:
        result, error = _outcome(fn)
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits
            _close(result)

    threading.Thread(target=work, name="netns", daemon=True).start()
    return await future


async def off_loop_to_the_end(fn: Callable[[], T]) -> T:
    """Like `off_loop`; a caller that is cancelled still waits until `fn` has returned, so that it works alone."""
    running = asyncio.ensure_future(off_loop(fn))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise


def enter_user_namespace(flags: int = syscalls.CLONE_NEWNET, *, map_all: bool = False) -> None:
    """Move this single-threaded process into a new user namespace, as its root, and into those of `flags` (CLONE_NEW…).

    One id is mapped: the caller's to 0, which is all that an ordinary user may do. With `map_all` a privileged caller
    keeps every id it has itself; for others this changes nothing. A new PID namespace begins with the next child.
    Raises OSError that says what to do where user namespaces are forbidden."""
    uid, gid = os.geteuid(), os.getegid()
    maps = (_whole_map("uid"), _whole_map("gid")) if map_all and uid == 0 else ("", "")
    if maps[0] and maps[1] and _enter_with_helper(flags, maps):
        return
    syscalls.unshare(syscalls.CLONE_NEWUSER | flags)
    # CVE-2014-8989: an unprivileged gid map is only accepted once setgroups is given up.
    _write_map("setgroups", "deny")
    _write_map("uid_map", f"0 {uid} 1")
    _write_map("gid_map", f"0 {gid} 1")


def _enter_with_helper(flags: int, maps: tuple[str, str]) -> bool:
    """Several ids can only be mapped from outside: a child that stays outside writes the maps. False: it was refused."""
    ready_read, ready_write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:  # pragma: no cover - measured by its effect
        status = 1
        try:
            os.close(ready_write)
            if os.read(ready_read, 1):
                for name, text in zip(("uid_map", "gid_map"), maps, strict=True):
                    with open(f"/proc/{parent}/{name}", "w") as file:
                        file.write(text)
                status = 0
        finally:
            os._exit(status)
    os.close(ready_read)
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(ready_write, b"1")
    finally:
        os.close(ready_write)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        # Already inside, with nothing mapped: map what every user may.
        _write_map("setgroups", "deny")
        _write_map("uid_map", "0 0 1")
        _write_map("gid_map", "0 0 1")
    if flags:
        syscalls.unshare(flags)
    return True


def _whole_map(kind: str) -> str:
    """The identity map of all ids that exist in the caller's user namespace."""
    with open(f"/proc/self/{kind}_map") as file:
        rows = [line.split() for line in file]
    return "\n".join(f"{inside} {inside} {count}" for inside, _, count in rows)


def _write_map(name: str, text: str) -> None:
    try:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    except OSError as error:
        code = error.errno or 0
        advice = syscalls.namespace_advice(code)
        message = f"writing /proc/self/{name} in a new user namespace: {os.strerror(code)}"
        raise OSError(code, message + (f" ({advice})" if advice else "")) from error


def _entered(fd: int, fn: Callable[[], T]) -> Callable[[], T]:
    def enter() -> T:
        syscalls.setns(fd, syscalls.CLONE_NEWNET)
        return fn()

    return enter


def _join(fn: Callable[[], T]) -> T:
    box: list[tuple[T | None, BaseException | None]] = []
    thread = threading.Thread(target=lambda: box.append(_outcome(fn)), name="netns", daemon=True)
    thread.start()
    thread.join()
    result, error = box[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # no error: the result is fn's


def _outcome(fn: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return fn(), None
    except BaseException as error:  # carried to the waiting side, which raises it
        return None, error


def _close(result: Any) -> None:
    close = getattr(result, "close", None)
    if close is not None:
        close()
