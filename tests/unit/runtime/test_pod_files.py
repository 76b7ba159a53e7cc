import base64
import ipaddress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from podwire.apiserver.schema import api_schema
from podwire.model.objects import ConfigMap, Pod, Secret, Volume
from podwire.model.podruntime import PodNetwork
from podwire.runtime.environment import References
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.podfiles import PodFiles, hosts_file, referenced, resolver_file

NETWORK = PodNetwork(ips=(ipaddress.ip_address("10.244.1.5"),), host_ips=(), nameservers=(ipaddress.ip_address("10.96.0.10"),))
REFERENCES = References(
    {"cm": msgspec.convert({"data": {"a.conf": "A", "b.conf": "B"}, "binaryData": {"c": "AAE="}}, ConfigMap)},
    {"sec": msgspec.convert({"data": {"key": base64.b64encode(b"K").decode()}}, Secret)},
)


def pod(**spec: Any) -> Pod:
    return msgspec.convert({"metadata": {"name": "web", "namespace": "shop", "uid": "u1"}, "spec": spec}, Pod)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_hosts_name_the_pod_and_its_aliases() -> None:
    text = hosts_file(pod(subdomain="db", hostAliases=[{"ip": "1.2.3.4", "hostnames": ["x", "y"]}]), NETWORK)
    assert "127.0.0.1\tlocalhost\n" in text
    assert "10.244.1.5\tweb.db.shop.svc.cluster.local\tweb\n" in text
    assert text.endswith("1.2.3.4\tx y\n")


def test_the_resolver_searches_the_namespace_first() -> None:
    assert resolver_file("shop", NETWORK) == (
        "search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    )


def test_volumes_become_directories_with_their_files(tmp_path: Path) -> None:
    described = pod(
        volumes=[
            {"name": "all", "configMap": {"name": "cm"}},
            {"name": "some", "configMap": {"name": "cm", "items": [{"key": "a.conf", "path": "deep/a", "mode": 384}]}},
            {"name": "secret", "secret": {"secretName": "sec"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "labels", "downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            {"name": "mixed", "projected": {"sources": [{"configMap": {"name": "cm"}}, {"secret": {"name": "sec"}}]}},
            {"name": "maybe", "configMap": {"name": "none", "optional": True}},
        ]
    )
    assert referenced(described) == ({"cm", "none"}, {"sec"})
    files = PodFiles(tmp_path, "u1")
    files.write(described, NETWORK, REFERENCES)
    volumes = files.directory / "volumes"
    assert contents(volumes / "all") == {"a.conf": b"A", "b.conf": b"B", "c": b"\0\1"}
    assert contents(volumes / "some") == {"deep/a": b"A"}
    assert (volumes / "some/deep/a").stat().st_mode & 0o777 == 0o600
    assert contents(volumes / "secret") == {"key": b"K"}
    assert contents(volumes / "labels") == {"name": b"web"}
    assert contents(volumes / "mixed") == {"a.conf": b"A", "b.conf": b"B", "c": b"\0\1", "key": b"K"}
    assert contents(volumes / "scratch") == contents(volumes / "maybe") == {}
    files.remove()
    assert not files.directory.exists()


def test_mounts_put_the_volume_where_the_container_wants_it(tmp_path: Path) -> None:
    described = pod(
        volumes=[{"name": "v", "configMap": {"name": "cm"}}],
        containers=[
            {
                "name": "c",
                "volumeMounts": [
                    {"name": "v", "mountPath": "/etc/app", "readOnly": True},
                    {"name": "v", "mountPath": "/etc/hosts", "subPath": "a.conf"},
                ],
            }
        ],
    )
    files = PodFiles(tmp_path, "u1")
    files.write(described, NETWORK, REFERENCES)
    mounts = {mount.target: mount for mount in files.mounts(described.spec.containers[0])}
    assert set(mounts) == {"/etc/app", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
    assert mounts["/etc/app"].read_only
    assert Path(mounts["/etc/hosts"].source).read_bytes() == b"A"


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ({"configMap": {"name": "no"}}, 'configmap "no" not found'),
        ({"secret": {"secretName": "no"}}, 'secret "no" not found'),
        ({"configMap": {"name": "cm", "items": [{"key": "no", "path": "x"}]}}, "non-existent config key: no"),
        ({"configMap": {"name": "cm", "items": [{"key": "a.conf", "path": "../../x"}]}}, "leads out of its volume"),
        ({"hostPath": {"path": "/nowhere/at/all"}}, "does not exist on this machine"),
        ({"persistentVolumeClaim": {"claimName": "data"}}, 'volume "v" : podwire .* of kind persistentVolumeClaim'),
        ({"nfs": {"server": "x", "path": "/"}}, "podwire does not have volumes of kind nfs"),
        ({"csi": {"driver": "x"}}, "podwire does not have volumes of kind csi"),
        ({"scaleIO": {"system": "x"}}, "podwire does not have volumes of kind scaleIO"),
    ],
)
def test_a_volume_that_cannot_be_had_is_named(tmp_path: Path, volume: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeFailure, match=message):
        PodFiles(tmp_path, "u1").write(pod(volumes=[{"name": "v", **volume}]), NETWORK, REFERENCES)


def test_every_kind_of_volume_that_the_api_takes_is_known() -> None:
    sources = set(api_schema().fields("k8s.io.api.core.v1.Volume")) - {"name"}
    mounted = {"configMap", "secret", "emptyDir", "hostPath", "downwardAPI", "projected"}
    assert mounted < sources
    for kind in sources - mounted:
        assert msgspec.convert({"name": "v", kind: {"x": 1}}, Volume).unsupported == kind


def test_a_host_network_pod_keeps_the_machines_resolver(tmp_path: Path) -> None:
    files = PodFiles(tmp_path, "u1")
    described = pod(hostNetwork=True, containers=[{"name": "c"}])
    files.write(described, NETWORK, REFERENCES)
    assert files.mounts(described.spec.containers[0]) == ()
    dns = pod(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet", containers=[{"name": "c"}])
    files.write(dns, NETWORK, REFERENCES)
    assert [mount.target for mount in files.mounts(dns.spec.containers[0])] == ["/etc/resolv.conf"]
