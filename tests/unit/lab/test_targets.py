"""What a TARGET on the command line names."""

import pytest

from podwire.lab.targets import PlaceTarget, PodTarget, Target, find_target
from podwire.model.errors import InvalidInput
from podwire.model.meta import ObjectMeta
from podwire.model.objects import Container, Pod, PodSpec


def pod(namespace: str, name: str, *containers: str) -> Pod:
    spec = PodSpec(containers=tuple(Container(name=c) for c in containers or ("main",)))
    return Pod(metadata=ObjectMeta(namespace=namespace, name=name), spec=spec)


NODES = ("node1", "node2")
PODS = (
    pod("shop", "cart", "cart", "exporter"),
    pod("shop", "web"),
    pod("test", "web"),
    pod("test", "node1"),
    pod("cart", "exporter"),
)


@pytest.mark.parametrize(
    ("text", "namespace", "expected"),
    [
        ("world", "", PlaceTarget("world")),
        ("balancer", "", PlaceTarget("balancer")),
        ("node1", "", PlaceTarget("node1")),
        ("node1", "test", PodTarget("test", "node1", "main")),
        ("test/node1", "", PodTarget("test", "node1", "main")),
        ("cart", "", PodTarget("shop", "cart", "cart")),
        ("cart/cart", "", PodTarget("shop", "cart", "cart")),
        ("shop/cart", "", PodTarget("shop", "cart", "cart")),
        ("shop/cart/exporter", "", PodTarget("shop", "cart", "exporter")),
        ("web", "test", PodTarget("test", "web", "main")),
        ("test/web", "", PodTarget("test", "web", "main")),
    ],
)
def test_names(text: str, namespace: str, expected: Target) -> None:
    assert find_target(text, NODES, PODS, namespace) == expected


@pytest.mark.parametrize(
    ("text", "choices"), [("web", "shop/web/main, test/web/main"), ("cart/exporter", "shop/cart/exporter, cart/exporter/main")]
)
def test_what_could_be_several_is_refused_with_the_choices(text: str, choices: str) -> None:
    with pytest.raises(InvalidInput, match=choices):
        find_target(text, NODES, PODS)


@pytest.mark.parametrize("text", ["db", "shop/db", "cart/nginx", "shop/cart/nginx", "a/b/c/d", ""])
def test_what_does_not_exist_is_refused_with_what_does(text: str) -> None:
    with pytest.raises(InvalidInput, match="nodes are node1, node2; pods are cart/exporter"):
        find_target(text, NODES, PODS)


def test_a_pod_may_say_which_container_is_meant() -> None:
    plain = pod("shop", "mesh", "proxy", "app")
    meta = ObjectMeta(namespace="shop", name="mesh", annotations={"kubectl.kubernetes.io/default-container": "app"})
    assert find_target("mesh", NODES, [plain]) == PodTarget("shop", "mesh", "proxy")
    assert find_target("mesh", NODES, [Pod(metadata=meta, spec=plain.spec)]) == PodTarget("shop", "mesh", "app")
