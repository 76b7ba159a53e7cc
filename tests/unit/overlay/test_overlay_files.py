"""Files that an overlay agent leaves: texts as flannel has them, atomic, keys for the owner alone."""

import base64
import ipaddress
import os
from pathlib import Path

import pytest

from podwire.agent.overlayd.files import (
    docker_options,
    read_last_subnets,
    subnet_env,
    subnets_in_env,
    wireguard_keys,
    write_atomically,
)
from podwire.model.errors import InvalidInput

net = ipaddress.ip_network
NETWORKS = (net("10.5.0.0/16"), net("fd05::/48"))
SUBNETS = (net("10.5.34.0/24"), net("fd05:0:0:22::/64"))


def test_subnet_env_is_flannels() -> None:
    assert subnet_env(NETWORKS[:1], SUBNETS[:1], 1450, masquerade=False) == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    assert subnet_env(NETWORKS, SUBNETS, 1430, masquerade=True) == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\n"
        "FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:22::1/64\n"
        "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    )


def test_the_last_subnets_are_read_from_it(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    assert read_last_subnets(path) == ()
    path.write_text(subnet_env(NETWORKS, SUBNETS, 1430, masquerade=True))
    assert read_last_subnets(path) == SUBNETS
    assert subnets_in_env('FLANNEL_SUBNET="10.5.34.1/24"\nFLANNEL_IPV6_SUBNET=\nnoise') == SUBNETS[:1]
    assert subnets_in_env("FLANNEL_SUBNET=nonsense") == ()
    path.write_bytes(b"\xff\xfe")
    assert read_last_subnets(path) == ()


def test_docker_masquerades_exactly_if_we_do_not() -> None:
    assert docker_options(SUBNETS, 1450, masquerade=True) == (
        'DOCKER_OPT_BIP="--bip=10.5.34.1/24"\nDOCKER_OPT_IPMASQ="--ip-masq=false"\nDOCKER_OPT_MTU="--mtu=1450"\n'
        'DOCKER_OPTS=" --bip=10.5.34.1/24 --ip-masq=false --mtu=1450"\n'
    )
    assert "--ip-masq=true" in docker_options(SUBNETS, 1450, masquerade=False)
    assert "--bip" not in docker_options(SUBNETS[1:], 1450, masquerade=False)


def test_a_file_is_replaced_at_once_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "run" / "subnet.env"
    write_atomically(path, "one\n")
    with path.open() as reader:
        write_atomically(path, "two\n")
        assert reader.read() == "one\n"  # whoever reads has the old file, whole
    assert path.read_text() == "two\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "subnet.env").mkdir()
    with pytest.raises(OSError, match="irectory"):
        write_atomically(tmp_path / "subnet.env", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["subnet.env"]


def test_wireguard_keys_are_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "wgkey"
    old = os.umask(0)
    try:
        keys = wireguard_keys(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (len(base64.b64decode(keys.private)), len(base64.b64decode(keys.public))) == (32, 32)
    path.chmod(0o644)
    assert wireguard_keys(path) == keys
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_is_kept_as_the_kernel_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "wgkey"
    path.write_text(base64.b64encode(b"\xff" * 32).decode())
    assert base64.b64decode(wireguard_keys(path).private) == b"\xf8" + b"\xff" * 30 + b"\x7f"


def test_the_public_key_is_curve25519s(tmp_path: Path) -> None:
    """RFC 7748, section 5.2: one iteration from the scalar 9 and the base point 9."""
    path = tmp_path / "wgkey"
    path.write_text(base64.b64encode(bytes([9, *bytes(31)])).decode())
    assert base64.b64decode(wireguard_keys(path).public).hex() == (
        "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    )


@pytest.mark.parametrize("content", [b"short", b"", b"\xff\xff", b"#" * 44])
def test_a_broken_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wgkey"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="holds no WireGuard key"):
        wireguard_keys(path)
