"""ConfigMaps and Secrets for the pod runtime, fetched when a pod needs them."""

import msgspec

from podwire.client.api import ApiClient
from podwire.client.errors import NotFound
from podwire.model.objects import ConfigMap, Secret
from podwire.model.resources import CONFIGMAPS, SECRETS


class ApiConfigSource:
    """Reads from the API each time: pods start seldom, and what they start with must be current."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def config_map(self, namespace: str, name: str) -> ConfigMap | None:
        try:
            return msgspec.convert(await self._client.get(CONFIGMAPS, name, namespace), ConfigMap)
        except NotFound:
            return None

    async def secret(self, namespace: str, name: str) -> Secret | None:
        try:
            return msgspec.convert(await self._client.get(SECRETS, name, namespace), Secret)
        except NotFound:
            return None
