"""Reading manifests: several documents, Lists, directories, and mistakes that are named with their place."""

from pathlib import Path

import pytest

from podwire.lab.manifests import LAST_APPLIED, configuration, load_manifests, parse_manifest
from podwire.model.errors import InvalidInput

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"


def test_documents_come_in_order_and_empty_ones_do_not_count() -> None:
    documents = parse_manifest(f"---\n{POD}---\n---\n# nothing\n---\n{POD.replace('name: a', 'generateName: b-')}", "x.yaml")
    assert [(d.title, d.where) for d in documents] == [("Pod a", "x.yaml, document 1"), ("Pod b-", "x.yaml, document 4")]


def test_lists_are_opened() -> None:
    items = [
        f"- {{apiVersion: v1, kind: {kind}, metadata: {{name: {name}}}}}" for kind, name in (("Pod", "a"), ("Service", "b"))
    ]
    text = "\n".join(["apiVersion: v1", "kind: List", "items:", *items])
    assert [d.title for d in parse_manifest(text, "x.yaml")] == ["Pod a", "Service b"]


def test_json_is_yaml() -> None:
    assert [d.title for d in parse_manifest('{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}', "x")] == ["Pod a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"x.yaml: is not YAML \(line 2, column 1: "),
        ("just text", "x.yaml, document 1 is no Kubernetes object"),
        ("kind: Pod", "needs apiVersion and kind"),
        (f"{POD}---\napiVersion: v1\nkind: Pod\n", r"x.yaml, document 2 \(Pod\) has no metadata.name"),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_manifest(text, "x.yaml")


def test_directories_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "20.yaml").write_text(POD.replace("name: a", "name: second"))
    (tmp_path / "10.yml").write_text(POD.replace("name: a", "name: first"))
    (tmp_path / "readme.md").write_text("# no manifest")
    assert [d.title for d in load_manifests([tmp_path])] == ["Pod first", "Pod second"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidInput, match="holds no"):
        load_manifests([empty])
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_manifests([tmp_path / "missing.yaml"])


def test_the_last_applied_configuration_is_kubectls_byte_for_byte() -> None:
    (document,) = parse_manifest(
        f'kind: Pod\napiVersion: v1\nmetadata: {{name: ä, annotations: {{x: "a<b>&\\u2028", {LAST_APPLIED}: old}}}}', "x.yaml"
    )
    config, record = configuration(document.object, "shop")
    metadata = '"annotations":{"x":"a\\u003cb\\u003e\\u0026\\u2028"},"name":"ä","namespace":"shop"'
    assert record == f'{{"apiVersion":"v1","kind":"Pod","metadata":{{{metadata}}}}}\n'
    assert config["metadata"] == {"name": "ä", "namespace": "shop", "annotations": {"x": "a<b>&\u2028"}}
    assert configuration({"kind": "Node", "metadata": {"name": "n"}}, None)[0]["metadata"] == {"name": "n", "annotations": {}}


def test_the_shop_is_readable() -> None:
    shop = Path(__file__).parents[3] / "examples" / "shop"
    assert {d.object["kind"] for d in load_manifests([shop])} >= {"Namespace", "Pod", "Deployment", "Service"}
