"""The three back ends for Services, each with a kernel that is a value: it is told to do what an agent would tell it, and an
evaluator walks packets through it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from iptablestables import Tables, empty, execute, held
from service_proof import disagreements, pruned, refused_where_bound
from service_worlds import canonical, change_to

from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.ipvs import IpvsOp
from podwire.model.nft import Batch, Ruleset
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.iptables import IptablesPlanner
from podwire.plan.ipvs import IpvsPlanner, after, introduce, retire
from podwire.plan.services import ServicePlanner
from podwire.trace import iptables, ipvs, netfilter
from podwire.trace.iptables import lists_of_clients
from podwire.trace.ipvs import IpvsNode
from podwire.trace.journey import Learned, Machine, Packet, Result, both
from podwire.trace.oracle import Cluster, Connection, Outcome, Promise, promise


class Simulated(Protocol):
    """A planner, and a kernel that does what it is told. `memory`: what packets left in it."""

    memory: Learned

    def set_facts(self, facts: NodeFacts) -> None: ...

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None: ...

    def set_host_ports(self, uid: str, pod: Pod | None) -> None: ...

    def program(self) -> None:
        """The kernel is brought up to date with what changed."""
        ...

    def compare(self) -> None:
        """The kernel is brought up to date from what it holds."""
        ...

    def walk(self, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result: ...

    def promised(self, cluster: Cluster, connection: Connection) -> Promise | None:
        """What this back end promises; None: nothing."""
        ...

    def held(self) -> object:
        """What the kernel holds, in a form in which what means the same is equal."""
        ...

    def desired(self) -> object:
        """The same of what it shall hold."""
        ...


class _Fed:
    """Hands on what it is fed with."""

    def __init__(self, planner: Any) -> None:
        self.set_facts, self.set_service = planner.set_facts, planner.set_service
        self.set_host_ports = planner.set_host_ports
        self.memory: Learned = {}

    def promised(self, cluster: Cluster, connection: Connection) -> Promise | None:
        return promise(cluster, connection)


class SimulatedNft(_Fed):
    def __init__(self, facts: NodeFacts) -> None:
        self.planner = ServicePlanner(facts)
        super().__init__(self.planner)
        self.kernel = Ruleset()

    def program(self) -> None:
        self._commit(self.planner.take_batch())

    def compare(self) -> None:
        self._commit(self.planner.resync(self.kernel))

    def _commit(self, batch: Batch) -> None:
        self.kernel = self.kernel.apply(batch)
        self.memory = pruned(self.memory, batch)

    def walk(self, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result:
        return netfilter.follow(self.kernel, packet, machine, locally_made=locally_made)

    def held(self) -> object:
        return canonical(self.kernel)

    def desired(self) -> object:
        return canonical(self.planner.desired())


class SimulatedIptables(_Fed):
    def __init__(self, facts: NodeFacts) -> None:
        self.planner = IptablesPlanner(facts)
        super().__init__(self.planner)
        self._tables: dict[Family, Tables] = {family: empty() for family in Family}
        self.kernel = {family: held(tables) for family, tables in self._tables.items()}

    def program(self) -> None:
        self._restore((text.family, text.text) for text in self.planner.take())

    def compare(self) -> None:
        self._restore((text.family, text.text) for text in self.planner.resync(self.kernel))

    def _restore(self, texts: Iterable[tuple[Family, str]]) -> None:
        for family, text in texts:
            self._tables[family] = execute(self._tables[family], text)
            self.kernel[family] = held(self._tables[family])
        # The kernel forgets a list of clients with the last rule that names it (xt_recent.c).
        named = {name for chains in self.kernel.values() for name in lists_of_clients(chains)}
        self.memory = {place: clients for place, clients in self.memory.items() if place in named}

    def walk(self, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result:
        return iptables.follow(self.kernel, packet, machine, locally_made=locally_made)

    def held(self) -> object:
        return dict(self.kernel)

    def desired(self) -> object:
        return self.planner.desired()


class SimulatedIpvs(_Fed):
    """`busy`: real servers have connections, so those that leave are drained and stay."""

    def __init__(self, facts: NodeFacts, *, busy: bool = False) -> None:
        self.planner = IpvsPlanner(facts)
        super().__init__(self.planner)
        self.kernel, self._busy = IpvsNode(), busy

    def program(self) -> None:
        changes = self.planner.take()
        wanted = {key: server for key, server in changes.servers.items() if server is not None}
        self._execute(introduce(wanted, self._those(changes.servers)))
        self._commit(changes.batch)
        self._execute(retire(wanted, self._those(changes.servers)))
        self._settle()

    def compare(self) -> None:
        wanted = self.planner.servers()
        self._execute(introduce(wanted, self.kernel.servers))
        self._commit(self.planner.resync(self.kernel.rules))
        self._execute(retire(wanted, self.kernel.servers))
        self._settle()

    def _those(self, keys: Iterable[Any]) -> Mapping[Any, Any]:
        return {key: self.kernel.servers[key] for key in keys if key in self.kernel.servers}

    def _execute(self, ops: Iterable[IpvsOp]) -> None:
        self.kernel = replace(self.kernel, servers=after(self.kernel.servers, ops))

    def _commit(self, batch: Batch) -> None:
        bound = self.kernel.bound | self.planner.bound()
        self.kernel = replace(self.kernel, rules=self.kernel.rules.apply(batch), bound=bound)
        self.memory = pruned(self.memory, batch)

    def _settle(self) -> None:
        """As an agent does once the last connections have ended."""
        if not self._busy:
            self._execute(retire(self.planner.servers(), self.kernel.servers, {}))
        needed = self.planner.bound() | {key.address for key in self.kernel.servers}
        self.kernel = replace(self.kernel, bound=self.kernel.bound & needed)

    def walk(self, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result:
        return ipvs.follow(self.kernel, packet, machine, locally_made=locally_made)

    def promised(self, cluster: Cluster, connection: Connection) -> Promise | None:
        """Where nothing is served any more, IPVS refuses until the last connection has ended, instead of whoever has the
        address then."""
        found = refused_where_bound(self.kernel.bound)(cluster, connection)
        return None if self._busy and promise(cluster, connection).outcome is Outcome.UNTOUCHED else found

    def held(self) -> object:
        return canonical(self.kernel.rules), dict(self.kernel.servers), self.kernel.bound

    def desired(self) -> object:
        rules = Ruleset().apply(self.planner.resync(Ruleset()))
        return canonical(rules), self.planner.servers(), self.planner.bound()


BACK_ENDS: dict[str, type[SimulatedNft] | type[SimulatedIptables] | type[SimulatedIpvs]] = {
    "nftables": SimulatedNft,
    "iptables": SimulatedIptables,
    "ipvs": SimulatedIpvs,
}


def remember(back_end: Simulated, result: Result) -> None:
    back_end.memory = both(back_end.memory, result.learned)


def serving(back_end: str, cluster: Cluster) -> Simulated:
    """A back end that serves the cluster on its node."""
    made = BACK_ENDS[back_end](cluster.node)
    change_to(made, None, cluster)
    made.program()
    return made


def broken_promises(kernel: Simulated, cluster: Cluster) -> Iterator[str]:
    """See `disagreements`."""
    return disagreements(cluster, kernel.walk, kernel.promised)
