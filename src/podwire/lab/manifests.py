"""Applying manifests to any API server: what `kubectl apply --server-side -f` does, for files and directories.

The fields belong to the managers that kubectl has, and the annotation of client-side apply is there, so that
`kubectl apply -f` goes on from here, with --server-side or without: no conflict and no warning."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from podwire.client.api import ApiClient, PatchKind
from podwire.client.errors import ApiError, NotFound
from podwire.model.errors import InvalidInput
from podwire.model.meta import Json
from podwire.model.resources import Resource
from podwire.model.yamltext import parse_yaml

FIELD_MANAGER = "kubectl"
"""Who `kubectl apply --server-side` is."""
ANNOTATION_MANAGER = "kubectl-last-applied"
"""Whose kubectl makes LAST_APPLIED when it applies on the server's side, so that its next apply does not prune it."""
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""What `kubectl apply` compares with, to find what a manifest no longer has."""
ANNOTATIONS_LIMIT = 262144
"""Bytes of all annotations that an API server takes (k8s.io/apimachinery api/validation): what is larger goes without."""


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a manifest, and where it was written: `file.yaml, document 3`."""

    where: str
    object: Json

    @property
    def title(self) -> str:
        return f"{self.object['kind']} {self.object['metadata'].get('name') or self.object['metadata'].get('generateName')}"


def manifest_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given; directories become their *.yaml, *.yml and *.json in order. Raises InvalidInput."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml", ".json"))
            if not inside:
                raise InvalidInput(f"{path} holds no *.yaml, *.yml or *.json file")
            files += inside
        else:
            files.append(path)
    return files


def load_manifests(paths: Iterable[Path]) -> list[Document]:
    """All objects in the files, in order, Lists opened up; one at least. Raises InvalidInput that names file and document."""
    paths = list(paths)
    documents: list[Document] = []
    for path in manifest_files(paths):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
        documents += parse_manifest(text, str(path))
    if not documents:
        raise InvalidInput(f"nothing to apply: {', '.join(map(str, paths))} holds no object")
    return documents


def parse_manifest(text: str | bytes, source: str) -> list[Document]:
    """The objects of one multi-document YAML (or JSON) text. Raises InvalidInput."""
    documents: list[Document] = []
    for number, part in enumerate(parse_yaml(text, source), start=1):
        if part is not None:
            documents += _opened(part, f"{source}, document {number}")
    return documents


def _opened(part: object, where: str) -> Iterator[Document]:
    if not isinstance(part, dict) or not isinstance(part.get("kind"), str) or not isinstance(part.get("apiVersion"), str):
        raise InvalidInput(f"{where} is no Kubernetes object: it needs apiVersion and kind")
    if part["kind"] == "List":
        for number, item in enumerate(part.get("items") or (), start=1):
            yield from _opened(item, f"{where}, item {number}")
        return
    metadata = part.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        raise InvalidInput(f"{where} ({part['kind']}) has no metadata.name")
    yield Document(where, part)


async def apply_manifests(client: ApiClient, documents: Sequence[Document], namespace: str = "default") -> list[Json]:
    """Server-side apply, in order; objects without a namespace go to `namespace`. Returns what the server made of them.

    Raises InvalidInput for a kind that the server does not have, and for what it rejects."""
    discovery = _Discovery(client)
    results: list[Json] = []
    for document in documents:
        resource = await discovery.resource(document)
        try:
            results.append(await _apply(client, resource, document.object, namespace))
        except ApiError as error:
            raise InvalidInput(f"{document.where}: {document.title} was not accepted: {error}") from error
    return results


async def _apply(client: ApiClient, resource: Resource, obj: Json, namespace: str) -> Json:
    place = (obj["metadata"].get("namespace") or namespace) if resource.namespaced else None
    if not obj["metadata"].get("name"):
        return await client.create(resource, obj, place)
    config, record = configuration(obj, place)
    name, kind = obj["metadata"]["name"], PatchKind.APPLY
    made = await client.patch(resource, name, config, place, kind=kind, field_manager=FIELD_MANAGER, force=True)
    others = config["metadata"].get("annotations") or {}
    if sum(len(f"{key}{value}".encode()) for key, value in {**others, LAST_APPLIED: record}.items()) > ANNOTATIONS_LIMIT:
        return made
    identity = {key: value for key, value in config["metadata"].items() if key in ("name", "namespace")}
    annotated = {
        "apiVersion": config["apiVersion"],
        "kind": config["kind"],
        "metadata": {**identity, "annotations": {LAST_APPLIED: record}},
    }
    return await client.patch(resource, name, annotated, place, kind=kind, field_manager=ANNOTATION_MANAGER, force=True)


def configuration(obj: Json, namespace: str | None) -> tuple[Json, str]:
    """What to apply, namespace filled in and an old LAST_APPLIED left out; and its LAST_APPLIED, byte for byte kubectl's."""
    annotations = {key: value for key, value in (obj["metadata"].get("annotations") or {}).items() if key != LAST_APPLIED}
    metadata = {**obj["metadata"], "annotations": annotations}
    if namespace is not None:
        metadata["namespace"] = namespace
    config = {**obj, "metadata": metadata}
    text = msgspec.json.encode(config, order="sorted").decode() + "\n"
    for char in "<>&\u2028\u2029":  # Go's JSON encoder escapes these
        text = text.replace(char, f"\\u{ord(char):04x}")
    return config, text


class _ResourceEntry(msgspec.Struct):
    name: str
    kind: str
    namespaced: bool


class _ResourceList(msgspec.Struct):
    resources: list[_ResourceEntry] = []


class _Discovery:
    """Which kinds the server has, asked once for each group and version."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._known: dict[str, dict[str, Resource]] = {}

    async def resource(self, document: Document) -> Resource:
        api_version, kind = document.object["apiVersion"], document.object["kind"]
        if api_version not in self._known:
            self._known[api_version] = await self._ask(api_version)
        found = self._known[api_version].get(kind)
        if found is None:
            raise InvalidInput(f'{document.where}: no matches for kind "{kind}" in version "{api_version}" on this API server')
        return found

    async def _ask(self, api_version: str) -> dict[str, Resource]:
        group, _, version = api_version.rpartition("/")
        try:
            body = await self._client.request("GET", f"/apis/{api_version}" if group else f"/api/{version}")
        except NotFound:
            return {}
        entries = msgspec.json.decode(body, type=_ResourceList).resources
        return {e.kind: Resource(group, version, e.name, e.kind, e.namespaced) for e in entries if "/" not in e.name}
