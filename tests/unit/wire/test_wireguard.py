"""WireGuard's netlink: what is set is what is read back."""

import base64
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.kernelstate import Wireguard, WireguardPeer
from podwire.wire import wireguard
from podwire.wire.netlink import Message, parse_messages

FAMILY = 33
keys = st.binary(min_size=32, max_size=32).filter(any).map(lambda raw: base64.b64encode(raw).decode())
networks = st.lists(
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(lambda a: ipaddress.ip_network(f"{a}/{a.max_prefixlen}")),
    max_size=5,
    unique=True,
).map(lambda found: tuple(sorted(found, key=wireguard.network_order)))
peers = st.builds(
    WireguardPeer,
    dev=st.just("flannel-wg"),
    public_key=keys,
    allowed=networks,
    endpoint=st.one_of(st.none(), st.tuples(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(1, 65535))),
    keepalive=st.integers(0, 65535),
    psk=st.one_of(st.just(""), keys),
)


def sent(raw: bytes) -> Message:
    (found,) = parse_messages(raw)
    return found


@given(peers, keys, st.integers(1, 65535))
def test_what_is_set_is_read_back(peer: WireguardPeer, private: str, port: int) -> None:
    """The kernel answers in the form in which it is told."""
    device = sent(wireguard.set_device(FAMILY, "flannel-wg", Wireguard(port, private)))
    state = wireguard.read_device("flannel-wg", [device, sent(wireguard.set_peer(FAMILY, peer))])
    assert state.device == Wireguard(port, private)
    (found,) = state.peers
    assert (found.public_key, found.allowed, found.keepalive, found.psk) == (
        peer.public_key,
        peer.allowed,
        peer.keepalive,
        peer.psk,
    )
    assert found.endpoint is None


@given(keys, networks, networks)
def test_a_peer_with_many_networks_goes_on_in_the_next_message(
    key: str, some: tuple[object, ...], more: tuple[object, ...]
) -> None:
    halves = [sent(wireguard.set_peer(FAMILY, WireguardPeer("wg", key, part))) for part in (some, more)]  # type: ignore[arg-type]
    (found,) = wireguard.read_device("wg", halves).peers
    assert set(found.allowed) == {*some, *more}


@pytest.mark.parametrize("key", ["", "short", "####", base64.b64encode(bytes(31)).decode()])
def test_a_malformed_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="a WireGuard key"):
        wireguard.set_device(FAMILY, "wg", Wireguard(1, key))
