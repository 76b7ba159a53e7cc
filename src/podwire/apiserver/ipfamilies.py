"""ipFamilies and ipFamilyPolicy of a Service: what they default to and which wishes contradict each other.

Rules: kube-apiserver's service allocator (initIPFamilyFields), Kubernetes documentation "IPv4/IPv6 dual-stack".
"""

from collections.abc import Sequence

from podwire.apiserver.validation import FieldError, Path, invalid
from podwire.model.meta import Json

SINGLE, PREFER, REQUIRE = "SingleStack", "PreferDualStack", "RequireDualStack"

_SPEC = Path() / "spec"


def family_of(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def settle_families(spec: Json, old: Json | None, configured: Sequence[str]) -> list[FieldError]:
    """Completes ipFamilyPolicy and ipFamilies (and shortens both lists on a downgrade) in place; returns what is wrong.

    `configured` are the cluster's families, the primary one first. `old` is the spec before, if the Service had one.
    """
    if spec.get("type") == "ExternalName":
        for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            spec.pop(key, None)
        return []
    if old is not None and old.get("type") != "ExternalName":
        _downgrade(spec, old)
    errors = _contradictions(spec)
    if errors:
        return errors
    headless = spec.get("clusterIP") == "None"
    if headless and not spec.get("selector"):
        _all_families(spec, configured)
        return []
    families = list(spec.get("ipFamilies") or [])
    if not headless:
        families += [family_of(address) for address in (spec.get("clusterIPs") or [])[len(families) :]]
    policy = spec.setdefault("ipFamilyPolicy", SINGLE)
    errors = _unconfigured(policy, families, configured)
    if errors:
        return errors
    if policy == SINGLE:
        families = (families or [configured[0]])[:1]
    else:
        families += [family for family in configured if family not in families]
    spec["ipFamilies"] = families
    return []


def _downgrade(spec: Json, old: Json) -> None:
    """A policy set to SingleStack drops the second family, unless the client changed the lists itself."""
    if spec.get("ipFamilyPolicy") != SINGLE:
        return
    for key in ("ipFamilies", "clusterIPs"):
        if len(spec.get(key) or []) > 1 and spec[key] == old.get(key):
            spec[key] = spec[key][:1]


def _contradictions(spec: Json) -> list[FieldError]:
    families, addresses = spec.get("ipFamilies") or [], spec.get("clusterIPs") or []
    policy = spec.get("ipFamilyPolicy")
    errors: list[FieldError] = []
    for key, values in (("ipFamilies", families), ("clusterIPs", addresses)):
        if len(values) > 1 and policy not in (PREFER, REQUIRE):
            text = f"must be RequireDualStack or PreferDualStack when multiple {key} are specified"
            errors.append(invalid(_SPEC / "ipFamilyPolicy", policy, text))
    for i, (family, address) in enumerate(zip(families, addresses, strict=False)):
        if address != "None" and family_of(address) != family:
            errors.append(
                invalid(_SPEC / "clusterIPs" @ i, address, f"expected an {family} value as indicated by `ipFamilies[{i}]`")
            )
    return errors


def _unconfigured(policy: str, families: list[str], configured: Sequence[str]) -> list[FieldError]:
    errors = [
        invalid(_SPEC / "ipFamilies" @ i, family, "not configured on this cluster")
        for i, family in enumerate(families)
        if family not in configured
    ]
    if policy == REQUIRE and len(configured) < 2:
        errors.append(invalid(_SPEC / "ipFamilyPolicy", policy, "this cluster is not configured for dual-stack services"))
    return errors


def _all_families(spec: Json, configured: Sequence[str]) -> None:
    """Headless without a selector: someone else fills in the endpoints, of whichever family."""
    policy = spec.setdefault("ipFamilyPolicy", REQUIRE)
    families = list(spec.get("ipFamilies") or [configured[0]])
    if policy != SINGLE:
        families += [family for family in ("IPv4", "IPv6") if family not in families]
    spec["ipFamilies"] = families
