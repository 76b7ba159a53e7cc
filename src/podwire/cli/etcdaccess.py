"""The etcd that a command's options --etcd-… name."""

from collections.abc import Mapping
from typing import Any

from podwire.client.etcd import EtcdClient, etcd_tls


def etcd_client(options: Mapping[str, Any]) -> EtcdClient:
    """`options`: the command's, by name; endpoints with commas between them. Raises InvalidInput, and OSError for files."""
    files = options["etcd_cafile"], options["etcd_certfile"], options["etcd_keyfile"]
    endpoints = options["etcd_endpoints"].split(",")
    secured = any(files) or any(endpoint.strip().startswith("https://") for endpoint in endpoints)
    user = (options["etcd_username"], options["etcd_password"]) if options["etcd_username"] else None
    return EtcdClient(endpoints, tls=etcd_tls(*files) if secured else None, user=user)
