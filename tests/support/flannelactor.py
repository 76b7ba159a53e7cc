"""A node that does with etcd what flannel 0.28 does (compat.md D1), for tests beside it. Written from that account."""

import asyncio
import ipaddress
import json
from contextlib import aclosing
from random import Random
from typing import Any

from podwire.client.etcdmessages import Compare, EtcdError, PutKey
from podwire.testing.fakeetcd import FakeEtcdClient


class FlannelNode:
    """`run` until cancelled; what ends flannel's process starts it again a second later, as its supervisor would.

    subnet: what it uses now. peers: key → value as it has read them."""

    def __init__(self, client: FakeEtcdClient, public_ip: str, mac: str, rng: Random, *, ttl: int, margin: float) -> None:
        self._client, self._rng = client, rng
        self._ttl, self._margin = ttl, margin
        self.value: dict[str, Any] = {
            "PublicIP": public_ip, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": mac}
        }  # fmt: skip
        self.subnet = ""
        self._last = ""
        """FLANNEL_SUBNET of the subnet file."""
        self.peers: dict[str, dict[str, Any]] = {}
        self.exits = 0

    async def run(self, prefix: str) -> None:
        while True:
            try:
                await self._process(f"{prefix}/subnets/", f"{prefix}/config")
            except* (EtcdError, _Exit):
                self.exits += 1
            self.subnet = ""
            await asyncio.sleep(1)

    async def _process(self, subnets: str, config: str) -> None:
        kv = await self._client.get(config)
        assert kv is not None
        revision = await self._acquire(subnets, json.loads(kv.value))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew(subnets))
            group.create_task(self._watch(subnets, revision))

    async def _acquire(self, subnets: str, config: dict[str, Any]) -> int:
        page = await self._client.read(subnets, prefix=True)
        leases = {kv.key.removeprefix(subnets): json.loads(kv.value) for kv in page.kvs}
        self.peers = {}
        mine = [key for key, value in leases.items() if value["PublicIP"] == self.value["PublicIP"]]
        if mine:
            await self._put(subnets, mine[0])
            self.subnet = self._last = mine[0]
        else:
            network = ipaddress.ip_network(config["Network"])
            last = ipaddress.ip_address(config["SubnetMax"])
            every = [s for s in network.subnets(new_prefix=config["SubnetLen"]) if int(s.network_address) <= int(last)]
            names = [f"{s.network_address}-{s.prefixlen}" for s in every[1:]]
            free = [name for name in names if name not in leases][:100]
            if not free:
                raise _Exit
            wanted = self._last if self._last in free else self._rng.choice(free)
            lease = await self._client.grant(self._ttl)
            done = await self._client.txn([Compare(subnets + wanted, "VERSION", 0)], [self._write(subnets + wanted, lease.id)])
            if not done.succeeded:
                raise _Exit
            self.subnet = self._last = wanted
        self.peers = {key: value for key, value in leases.items() if key != self.subnet}
        return page.header.revision

    async def _renew(self, subnets: str) -> None:
        while True:
            await asyncio.sleep(self._ttl - self._margin)
            while True:
                try:
                    await self._put(subnets, self.subnet)
                except EtcdError:
                    await asyncio.sleep(self._margin / 60)
                else:
                    break

    async def _put(self, subnets: str, name: str) -> None:
        """No comparison, no question whose it is."""
        lease = await self._client.grant(self._ttl)
        await self._client.txn([], [self._write(subnets + name, lease.id)])

    def _write(self, key: str, lease: int) -> PutKey:
        return PutKey(key, json.dumps(self.value, separators=(",", ":")).encode(), lease)

    async def _watch(self, subnets: str, revision: int) -> None:
        async with aclosing(self._client.watch(subnets, prefix=True, start_revision=revision + 1)) as changes:
            async for change in changes:
                for event in change.events:
                    name = event.kv.key.removeprefix(subnets)
                    if name == self.subnet:
                        if event.type == "DELETE":
                            raise _Exit
                    elif event.type == "DELETE":
                        self.peers.pop(name, None)
                    else:
                        self.peers[name] = json.loads(event.kv.value)


class _Exit(Exception):
    """flannel's process ends."""
