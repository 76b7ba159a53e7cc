"""The underlay: one bridge in the lab's own namespace, and a namespace with a cable to it for every place."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from podwire.kernel import syscalls
from podwire.kernel.netns import create_netns, current_netns, off_loop
from podwire.kernel.port import Kernel
from podwire.lab.errors import LabError
from podwire.lab.topology import API, Place, Topology
from podwire.model.ops import Applied, DelLink, Plan


class Fabric:
    """The places of a lab. `kernel` serves the lab's own namespace; every place is attached to it under `Place.netns`.

    Each namespace also gets a name in `names` (a directory), where `ip netns` and other processes find it."""

    def __init__(self, kernel: Kernel, topology: Topology, names: Path) -> None:
        self.kernel = kernel
        self.topology = topology
        self._names = names
        self.own_descriptor = current_netns()
        """The lab's own namespace, where the bridge is."""
        self._descriptors: dict[str, int] = {API: self.own_descriptor}
        self._places: dict[str, Place] = {API: topology.api}

    async def start(self) -> None:
        """Make the bridge, the world and the balancer. Raises LabError."""
        topology = self.topology
        for place in (topology.world, topology.balancer):
            await self._make_namespace(place)
        await self._apply((*topology.plan_fabric(), *topology.plan_world(), *topology.plan_balancer()))
        await self.introduce((topology.api, topology.world, topology.balancer))

    async def add_node(self, index: int) -> Place:
        """Make a node's machine: its namespace, its cable, its default route. Raises LabError."""
        place = self.topology.node(index)
        await self._make_namespace(place)
        await self._apply(self.topology.plan_node(place))
        return place

    async def add_machine(self, place: Place) -> None:
        """Make a machine that is no node. Raises LabError."""
        await self._make_namespace(place)
        await self._apply(self.topology.plan_place(place))

    async def introduce(self, fresh: Iterable[Place]) -> None:
        """Let these places and all others know each other's MAC for good; see `Topology.plan_neighbours`. Raises LabError."""
        await self._apply(self.topology.plan_neighbours(tuple(fresh), tuple(self._places.values())))

    async def unplug(self, place: Place) -> None:
        """Pull a node's cable: from now on nobody reaches it."""
        await self._apply((DelLink(place.name),))

    def forget(self, place: Place) -> None:
        """Let go of a node's namespace, which goes when the last process in it has ended."""
        self.kernel.detach(place.netns)
        self._unname(place.name)
        del self._places[place.name]
        os.close(self._descriptors.pop(place.name))

    def place(self, name: str) -> Place:
        """Raises LabError for an unknown one."""
        self.descriptor(name)
        return self._places[name]

    def descriptor(self, name: str) -> int:
        """The namespace of a place, ours: duplicate it to keep it. Raises LabError for an unknown one."""
        try:
            return self._descriptors[name]
        except KeyError:
            raise LabError(f"there is no {name} in this lab: its places are {', '.join(self._descriptors)}") from None

    def path(self, name: str) -> str:
        """Where another process of the lab can open the namespace of a place."""
        return str(self._names / name)

    def places(self) -> list[str]:
        return list(self._descriptors)

    def close(self) -> None:
        """Let go of all namespaces; with the last process and device in them they go."""
        for name in list(self._descriptors):
            self._unname(name)
            os.close(self._descriptors.pop(name))
        self._places.clear()

    async def _make_namespace(self, place: Place) -> None:
        try:
            descriptor = await off_loop(create_netns)
        except OSError as error:
            raise LabError(f"no network namespace can be made for {place.name}: {error.strerror or error}") from error
        self._descriptors[place.name] = descriptor
        self._places[place.name] = place
        name = self._names / place.name
        try:
            name.touch()
            syscalls.mount(f"/proc/self/fd/{descriptor}", str(name), flags=syscalls.MS_BIND)
        except OSError as error:
            raise LabError(f"the namespace of {place.name} cannot be named: {error.strerror or error}") from error
        self.kernel.attach(place.netns, descriptor)

    def _unname(self, name: str) -> None:
        with suppress(OSError):
            syscalls.umount2(str(self._names / name), syscalls.MNT_DETACH)
            (self._names / name).unlink()

    async def _apply(self, plan: Plan) -> None:
        check(await self.kernel.apply(plan), "the fabric")


def check(applied: Applied, what: str) -> None:
    """Raise LabError for the first operation that the kernel refused."""
    if not applied.ok:
        failure = applied.failures[0]
        raise LabError(f"{what} cannot be set up: {failure.op} failed: {failure.message or os.strerror(failure.errno)}")
