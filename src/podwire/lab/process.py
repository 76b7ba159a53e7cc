"""The lab process: PID 1 of the lab's namespaces, one event loop for all of it."""

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

from podwire.lab.boot import BootOrder, Report
from podwire.lab.cluster import LabCluster
from podwire.model.errors import PodwireError

log = logging.getLogger(__name__)


def run(order: BootOrder, report: Report) -> int:
    """Bring the cluster up, report, and run it until SIGTERM, a request to stop or the end of its leash. Returns the exit
    status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    _raise_descriptor_limit()
    try:
        asyncio.run(_main(order, report))
    except PodwireError as error:
        log.error("the lab cannot go on: %s", error)
        report.error(str(error))
        return 1
    except Exception as error:  # the process' own boundary: say it where the launcher and the log can show it
        log.exception("the lab ended by an error")
        report.error(f"internal error ({type(error).__name__}: {error}); the traceback is in {order.directory}/lab.log")
        return 1
    return 0


async def _main(order: BootOrder, report: Report) -> None:
    cluster = LabCluster(order.spec, order.directory, order.listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, cluster.request_stop)
    loop.add_signal_handler(signal.SIGCHLD, reap_orphans, cluster.is_own_child)
    if order.leash is not None:
        _end_with_leash(loop, order.leash, cluster.request_stop)
    try:
        await cluster.start(report.step)
        report.ready()
        report.close()
        await cluster.run()
    finally:
        await cluster.close()


def _end_with_leash(loop: asyncio.AbstractEventLoop, leash: int, stop: Callable[[], None]) -> None:
    def let_go() -> None:
        loop.remove_reader(leash)
        log.info("what this lab was started for has ended")
        stop()

    loop.add_reader(leash, let_go)  # nothing is ever written to it: readable means that it is at its end


def reap_orphans(is_own_child: Callable[[int], bool]) -> None:
    """Bury what was left to PID 1. A child of our own is left for the code that started it to wait for."""
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is None or is_own_child(info.si_pid):
                return
            os.waitpid(info.si_pid, os.WNOHANG)
        except ChildProcessError:
            return


def _raise_descriptor_limit() -> None:
    """Every node and pod costs a few descriptors; the usual soft limit of 1024 is far below what is allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
