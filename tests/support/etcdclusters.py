"""Whole etcd clusters for the store's tests, on the members of `etcdrig`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from etcdrig import Member, answers, free_port, need_etcd, one_member

from podwire.client.etcd import EtcdClient

QUICK = ("--heartbeat-interval", "10", "--election-timeout", "50")
"""A cluster of one elects itself at once."""


@asynccontextmanager
async def fresh_etcd(folder: Path) -> AsyncIterator[EtcdClient]:
    """An empty cluster of one, and its client, which the caller closes."""
    async with one_member(folder, *QUICK) as member:
        client = EtcdClient([member.client_url])
        await answers(client)
        yield client


@asynccontextmanager
async def three_members(folder: Path, *arguments: str) -> AsyncIterator[list[Member]]:
    """A cluster of three that has elected its leader."""
    need_etcd()
    names = ("one", "two", "three")
    peers = {name: f"http://127.0.0.1:{free_port()}" for name in names}
    cluster = ",".join(f"{name}={url}" for name, url in peers.items())
    more = ("--initial-cluster", cluster, "--heartbeat-interval", "50", "--election-timeout", "500", *arguments)
    members = [Member(folder, name, f"http://127.0.0.1:{free_port()}", peers[name], more) for name in names]
    try:
        for member in members:
            await member.start()
        async with EtcdClient([member.client_url for member in members]) as client:
            await answers(client)
        yield members
    finally:
        for member in members:
            await member.end()
