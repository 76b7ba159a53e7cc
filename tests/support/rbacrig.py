"""What a component asked of an API server, and what its manifest lets it ask, in RBAC's terms."""

from collections.abc import Iterable
from pathlib import Path

import yaml
from aiohttp import web

MANIFESTS = Path(__file__).parents[2] / "deploy/kubernetes"
Right = tuple[str, str, str]
"""(verb, API group, resource[/subresource])"""


def right_for(request: web.Request) -> Right | None:
    """What the request takes; None for one that is not for objects (discovery, say)."""
    _, root, *parts = request.path.split("/")
    if len(parts) < (2 if root == "api" else 3):
        return None
    group, rest = ("", parts[1:]) if root == "api" else (parts[0], parts[2:])
    if rest[0] == "namespaces" and len(rest) > 2:
        rest = rest[2:]
    plural, name, subresource = (*rest, "", "")[:3]
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(request.method, "get")
    if verb == "get" and not name:
        verb = "watch" if request.query.get("watch") == "true" else "list"
    return verb, group, f"{plural}/{subresource}" if subresource else plural


def rights_of(manifest: str) -> set[Right]:
    """Of all roles in a file below `deploy/kubernetes`."""
    documents = yaml.safe_load_all((MANIFESTS / manifest).read_text())
    rules = [rule for d in documents if d["kind"] in ("ClusterRole", "Role") for rule in d["rules"]]
    return set(_expanded(rules))


def _expanded(rules: Iterable[dict[str, list[str]]]) -> Iterable[Right]:
    for rule in rules:
        yield from ((v, g, r) for v in rule["verbs"] for g in rule["apiGroups"] for r in rule["resources"])
