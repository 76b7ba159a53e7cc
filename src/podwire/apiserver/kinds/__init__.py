"""The kinds that the API server serves. See `base.Kind` for what a kind is, `registry.REGISTRY` for the list."""

from podwire.apiserver.kinds.base import AGE, NAME, SCALE, STATUS, Column, Kind, Subresource
from podwire.apiserver.kinds.registry import REGISTRY, Registry
from podwire.apiserver.validation import FieldError

__all__ = ["AGE", "NAME", "REGISTRY", "SCALE", "STATUS", "Column", "FieldError", "Kind", "Registry", "Subresource"]
