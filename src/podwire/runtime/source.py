"""Where pods' ConfigMaps and Secrets come from; the agent provides it."""

from typing import Protocol

from podwire.model.objects import ConfigMap, Secret


class ConfigSource(Protocol):
    """None: there is no such object."""

    async def config_map(self, namespace: str, name: str) -> ConfigMap | None: ...

    async def secret(self, namespace: str, name: str) -> Secret | None: ...
