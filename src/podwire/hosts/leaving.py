"""`podwire leave`: end the node's pods, take it out of the API, and remove what it has in the kernel and on disk."""

import asyncio
import logging
import os
from contextlib import AsyncExitStack, ExitStack

from podwire.agent.nodelock import NodeLock
from podwire.agent.plumbing import Plumbing
from podwire.agent.proxymodes.modes import ProxyModes
from podwire.agent.reservations import Reservations
from podwire.client.errors import ApiError, NotFound
from podwire.hosts.errors import HostError
from podwire.hosts.files import remove
from podwire.hosts.membership import STATE_NAMES, Membership
from podwire.hosts.node import OWN_NETNS, RUN_NAMES, NodeOptions, pod_runtime
from podwire.kernel.linux import LinuxKernel
from podwire.model.cni import CNI_UID
from podwire.model.kernelstate import NetState
from podwire.model.resources import NODES
from podwire.runtime.shimclient import join_shim

log = logging.getLogger(__name__)

STOP_SECONDS = 10
"""How long containers have to end."""

API_SECONDS = 10.0


async def leave(membership: Membership, options: NodeOptions, *, force: bool = False) -> None:
    """Raises HostError where containers of an engine are still attached, or the API cannot be told; with `force` both are
    passed over. Raises AnotherAgent where the agent still runs. Can be done again after a failure."""
    with ExitStack() as stack:
        agent = membership.state / "agent"
        agent.mkdir(parents=True, exist_ok=True, mode=0o700)
        stack.callback(NodeLock(agent).close)
        attached = _attached(membership)
        if attached and not force:
            some = ", ".join(attached[:5]) + (", …" if len(attached) > 5 else "")
            raise HostError(
                f"{len(attached)} containers of an engine are attached here ({some}): end them first, or use --force, "
                "which takes their network away"
            )
        await _tell_api(membership, force=force)
        await _end_pods(membership, options)
        await _clean_kernel()
    remove(options.run, RUN_NAMES)
    remove(membership.state, STATE_NAMES)


def _attached(membership: Membership) -> list[str]:
    """What engines have here, by name."""
    path = membership.state / "agent" / "reservations.db"
    if not path.exists():
        return []
    reservations = Reservations(path)
    try:
        return sorted({f"{r.namespace}/{r.name}" for r in reservations.all() if r.uid.startswith(CNI_UID)})
    finally:
        reservations.close()


async def _tell_api(membership: Membership, *, force: bool) -> None:
    name = membership.record.name
    async with membership.client("podwire-leave") as client:
        try:
            async with asyncio.timeout(API_SECONDS):
                await client.delete(NODES, name)
        except NotFound:
            log.info("node %s is not in the API any more", name)
        except (ApiError, TimeoutError) as error:
            if not force:
                raise HostError(
                    f"the API server at {membership.cluster} was not told ({error or 'it does not answer'}): try again, "
                    f"or use --force and delete the Node {name} there yourself"
                ) from error
            log.warning("node %s stays in the API: %s", name, error)


async def _end_pods(membership: Membership, options: NodeOptions) -> None:
    shim = join_shim(options.run / "shim")
    try:
        runtime = pod_runtime(membership, options, shim.socket_path)
        try:
            uids = [sandbox.uid for sandbox in await runtime.sandboxes()]
            await asyncio.gather(*(runtime.stop(uid, STOP_SECONDS) for uid in uids))
            await asyncio.gather(*(runtime.remove(uid) for uid in uids))
        finally:
            await runtime.close()
    except BaseException:
        os.close(shim.pidfd)
        raise
    await asyncio.to_thread(shim.stop)


async def _clean_kernel() -> None:
    """Remove what is marked as ours: links, with them their addresses and routes, and the Services' rules of any mode."""
    async with AsyncExitStack() as stack:
        netns = os.open(OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, netns)
        kernel = LinuxKernel()
        stack.push_async_callback(kernel.close)
        await Plumbing(kernel).adopt(NetState(), {}, ())
        await ProxyModes(kernel, netns).clean_up()
