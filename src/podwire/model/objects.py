"""API objects as podwire's own parts use them: typed views that decode straight from JSON (msgspec) and ignore the rest.

They are read-only. Whoever writes to the API patches, or edits the JSON document, so that unknown fields survive.
Field names are the API's in snake case; see the Kubernetes API reference for their meaning.
"""

import msgspec

from podwire.model.ids import ObjectKey
from podwire.model.meta import LabelSelector, ObjectMeta


class View(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """Base of all typed views. Trees of immutable values have no cycles: the collector need not walk them (gc=False), which
    at 10,000 Services saves a fifth of the time to plan them."""


class ApiObject(View, frozen=True):
    metadata: ObjectMeta = ObjectMeta()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.metadata.namespace, self.metadata.name)


class ObjectReference(View, frozen=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class Condition(View, frozen=True):
    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


# --- Node ---------------------------------------------------------------------------------------------------------


class Taint(View, frozen=True):
    key: str
    effect: str
    value: str = ""


class NodeSpec(View, frozen=True):
    pod_cidr: str = msgspec.field(name="podCIDR", default="")
    pod_cidrs: tuple[str, ...] = msgspec.field(name="podCIDRs", default=())
    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()


class NodeAddress(View, frozen=True):
    type: str
    address: str


class NodeInfo(View, frozen=True):
    boot_id: str = msgspec.field(name="bootID", default="")


class NodeStatus(View, frozen=True):
    addresses: tuple[NodeAddress, ...] = ()
    conditions: tuple[Condition, ...] = ()
    allocatable: dict[str, str] = {}
    node_info: NodeInfo = NodeInfo()


class Node(ApiObject, frozen=True):
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def ready(self) -> bool:
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)

    @property
    def internal_ips(self) -> tuple[str, ...]:
        return tuple(a.address for a in self.status.addresses if a.type == "InternalIP")

    @property
    def external_ips(self) -> tuple[str, ...]:
        return tuple(a.address for a in self.status.addresses if a.type == "ExternalIP")


# --- Pod ----------------------------------------------------------------------------------------------------------


class ContainerPort(View, frozen=True):
    container_port: int
    name: str = ""
    protocol: str = "TCP"
    host_port: int = 0
    host_ip: str = msgspec.field(name="hostIP", default="")


class KeySelector(View, frozen=True):
    name: str = ""
    key: str = ""
    optional: bool = False


class FieldSelector(View, frozen=True):
    field_path: str


class EnvSource(View, frozen=True):
    field_ref: FieldSelector | None = None
    config_map_key_ref: KeySelector | None = None
    secret_key_ref: KeySelector | None = None


class EnvVar(View, frozen=True):
    name: str
    value: str = ""
    value_from: EnvSource | None = None


class NamedRef(View, frozen=True):
    name: str = ""
    optional: bool = False


class EnvFrom(View, frozen=True):
    prefix: str = ""
    config_map_ref: NamedRef | None = None
    secret_ref: NamedRef | None = None


class VolumeMount(View, frozen=True):
    name: str
    mount_path: str
    sub_path: str = ""
    read_only: bool = False


class HttpGet(View, frozen=True):
    port: int | str
    path: str = "/"
    host: str = ""
    scheme: str = "HTTP"
    http_headers: tuple[dict[str, str], ...] = ()


class TcpSocket(View, frozen=True):
    port: int | str
    host: str = ""


class ExecAction(View, frozen=True):
    command: tuple[str, ...] = ()


class Probe(View, frozen=True):
    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    exec: ExecAction | None = None
    initial_delay_seconds: int = 0
    timeout_seconds: int = 1
    period_seconds: int = 10
    success_threshold: int = 1
    failure_threshold: int = 3


class SleepAction(View, frozen=True):
    seconds: int = 0


class Handler(View, frozen=True):
    exec: ExecAction | None = None
    http_get: HttpGet | None = None
    sleep: SleepAction | None = None


class Lifecycle(View, frozen=True):
    post_start: Handler | None = None
    pre_stop: Handler | None = None


class Container(View, frozen=True):
    name: str
    image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    ports: tuple[ContainerPort, ...] = ()
    env: tuple[EnvVar, ...] = ()
    env_from: tuple[EnvFrom, ...] = ()
    volume_mounts: tuple[VolumeMount, ...] = ()
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    lifecycle: Lifecycle | None = None
    restart_policy: str = ""
    stdin: bool = False
    tty: bool = False


class KeyToPath(View, frozen=True):
    key: str
    path: str
    mode: int | None = None


class ConfigMapVolume(View, frozen=True):
    name: str
    items: tuple[KeyToPath, ...] = ()
    optional: bool = False
    default_mode: int = 0o644


class SecretVolume(View, frozen=True):
    secret_name: str
    items: tuple[KeyToPath, ...] = ()
    optional: bool = False
    default_mode: int = 0o644


class EmptyDir(View, frozen=True):
    medium: str = ""


class HostPath(View, frozen=True):
    path: str
    type: str = ""


class DownwardFile(View, frozen=True):
    path: str
    field_ref: FieldSelector | None = None


class DownwardVolume(View, frozen=True):
    items: tuple[DownwardFile, ...] = ()


class ProjectedMap(View, frozen=True):
    """A ConfigMap or Secret as a source of a projected volume."""

    name: str = ""
    items: tuple[KeyToPath, ...] = ()
    optional: bool = False


class ProjectedSource(View, frozen=True):
    config_map: ProjectedMap | None = None
    secret: ProjectedMap | None = None
    downward_api: DownwardVolume | None = msgspec.field(name="downwardAPI", default=None)


class ProjectedVolume(View, frozen=True):
    sources: tuple[ProjectedSource, ...] = ()


class OtherVolume(View, frozen=True):
    """A volume source of which only its presence matters."""


_MOUNTED = frozenset({"name", "configMap", "secret", "emptyDir", "hostPath", "downwardAPI", "projected"})
"""What of a Volume nodes here know."""


class Volume(View, frozen=True):
    name: str
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    empty_dir: EmptyDir | None = None
    host_path: HostPath | None = None
    downward_api: DownwardVolume | None = msgspec.field(name="downwardAPI", default=None)
    projected: ProjectedVolume | None = None
    # The rest of VolumeSource (k8s.io/api core/v1): read to say which kind it is that no node here can mount.
    aws_elastic_block_store: OtherVolume | None = None
    azure_disk: OtherVolume | None = None
    azure_file: OtherVolume | None = None
    cephfs: OtherVolume | None = None
    cinder: OtherVolume | None = None
    csi: OtherVolume | None = None
    ephemeral: OtherVolume | None = None
    fc: OtherVolume | None = None
    flex_volume: OtherVolume | None = None
    flocker: OtherVolume | None = None
    gce_persistent_disk: OtherVolume | None = None
    git_repo: OtherVolume | None = None
    glusterfs: OtherVolume | None = None
    image: OtherVolume | None = None
    iscsi: OtherVolume | None = None
    nfs: OtherVolume | None = None
    persistent_volume_claim: OtherVolume | None = None
    photon_persistent_disk: OtherVolume | None = None
    portworx_volume: OtherVolume | None = None
    quobyte: OtherVolume | None = None
    rbd: OtherVolume | None = None
    scale_io: OtherVolume | None = msgspec.field(name="scaleIO", default=None)
    storageos: OtherVolume | None = None
    vsphere_volume: OtherVolume | None = None

    @property
    def unsupported(self) -> str | None:
        """The kind of volume that nodes here cannot mount, as its manifest names it; None for one that they can."""
        held = (field.encode_name for field in msgspec.structs.fields(self) if getattr(self, field.name) is not None)
        return next((kind for kind in held if kind not in _MOUNTED), None)


class HostAlias(View, frozen=True):
    ip: str
    hostnames: tuple[str, ...] = ()


class Toleration(View, frozen=True):
    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""
    toleration_seconds: int | None = None


class TopologySpread(View, frozen=True):
    max_skew: int = 1
    topology_key: str = ""
    when_unsatisfiable: str = "DoNotSchedule"
    label_selector: LabelSelector | None = None


class PodSpec(View, frozen=True):
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    node_name: str = ""
    node_selector: dict[str, str] = {}
    host_network: bool = False
    share_process_namespace: bool = False
    hostname: str = ""
    subdomain: str = ""
    host_aliases: tuple[HostAlias, ...] = ()
    restart_policy: str = "Always"
    termination_grace_period_seconds: int = 30
    dns_policy: str = "ClusterFirst"
    service_account_name: str = ""
    tolerations: tuple[Toleration, ...] = ()
    topology_spread_constraints: tuple[TopologySpread, ...] = ()
    scheduler_name: str = "default-scheduler"


class PodIP(View, frozen=True):
    ip: str


class PodStatus(View, frozen=True):
    phase: str = ""
    conditions: tuple[Condition, ...] = ()
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: tuple[PodIP, ...] = msgspec.field(name="podIPs", default=())
    host_ip: str = msgspec.field(name="hostIP", default="")


class Pod(ApiObject, frozen=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ready(self) -> bool:
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)

    @property
    def finished(self) -> bool:
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def ips(self) -> tuple[str, ...]:
        return tuple(p.ip for p in self.status.pod_ips) or ((self.status.pod_ip,) if self.status.pod_ip else ())


# --- Service, EndpointSlice ---------------------------------------------------------------------------------------


class ServicePort(View, frozen=True):
    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str = 0
    node_port: int = 0
    app_protocol: str | None = None


class ClientIPConfig(View, frozen=True):
    timeout_seconds: int = 10800


class SessionAffinityConfig(View, frozen=True):
    client_ip: ClientIPConfig = msgspec.field(name="clientIP", default=ClientIPConfig())


class ServiceSpec(View, frozen=True):
    type: str = "ClusterIP"
    selector: dict[str, str] = {}
    ports: tuple[ServicePort, ...] = ()
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: tuple[str, ...] = msgspec.field(name="clusterIPs", default=())
    ip_families: tuple[str, ...] = ()
    ip_family_policy: str = ""
    external_ips: tuple[str, ...] = msgspec.field(name="externalIPs", default=())
    external_name: str = ""
    external_traffic_policy: str = ""
    internal_traffic_policy: str = "Cluster"
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig = SessionAffinityConfig()
    load_balancer_ip: str = msgspec.field(name="loadBalancerIP", default="")
    load_balancer_source_ranges: tuple[str, ...] = ()
    load_balancer_class: str | None = None
    allocate_load_balancer_node_ports: bool = True
    health_check_node_port: int = 0
    publish_not_ready_addresses: bool = False
    traffic_distribution: str | None = None


class LoadBalancerIngress(View, frozen=True):
    ip: str = ""
    hostname: str = ""
    ip_mode: str | None = None


class LoadBalancerStatus(View, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(View, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(ApiObject, frozen=True):
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()

    @property
    def headless(self) -> bool:
        return self.spec.cluster_ip == "None"


class EndpointConditions(View, frozen=True):
    """nil means: ready → True, serving → ready's value, terminating → False."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(View, frozen=True):
    name: str


class EndpointHints(View, frozen=True):
    for_zones: tuple[ForZone, ...] = ()
    for_nodes: tuple[ForZone, ...] = ()


class Endpoint(View, frozen=True):
    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    node_name: str = ""
    zone: str = ""
    hints: EndpointHints | None = None
    target_ref: ObjectReference | None = None


class EndpointPort(View, frozen=True):
    port: int | None = None
    name: str = ""
    protocol: str = "TCP"


class EndpointSlice(ApiObject, frozen=True):
    address_type: str = "IPv4"
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()

    @property
    def service(self) -> str:
        return self.metadata.labels.get("kubernetes.io/service-name", "")


# --- workloads and the rest ---------------------------------------------------------------------------------------


class RollingUpdate(View, frozen=True):
    max_surge: int | str = "25%"
    max_unavailable: int | str = "25%"


class DeploymentStrategy(View, frozen=True):
    type: str = "RollingUpdate"
    rolling_update: RollingUpdate | None = None


class DeploymentSpec(View, frozen=True):
    replicas: int = 1
    selector: LabelSelector = LabelSelector()
    strategy: DeploymentStrategy = DeploymentStrategy()
    min_ready_seconds: int = 0
    revision_history_limit: int = 10
    progress_deadline_seconds: int = 600
    paused: bool = False


class Deployment(ApiObject, frozen=True):
    """`template` stays JSON in the document; controllers hash and copy it whole."""

    spec: DeploymentSpec = DeploymentSpec()


class ReplicaSetSpec(View, frozen=True):
    replicas: int = 1
    selector: LabelSelector = LabelSelector()
    min_ready_seconds: int = 0


class ReplicaSetStatus(View, frozen=True):
    replicas: int = 0
    ready_replicas: int = 0
    available_replicas: int = 0
    fully_labeled_replicas: int = 0
    observed_generation: int = 0


class ReplicaSet(ApiObject, frozen=True):
    spec: ReplicaSetSpec = ReplicaSetSpec()
    status: ReplicaSetStatus = ReplicaSetStatus()


class LeaseSpec(View, frozen=True):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    renew_time: str | None = None


class Lease(ApiObject, frozen=True):
    spec: LeaseSpec = LeaseSpec()


class ConfigMap(ApiObject, frozen=True):
    data: dict[str, str] = {}
    binary_data: dict[str, str] = {}


class Secret(ApiObject, frozen=True):
    """`data` values are base64 as on the wire."""

    data: dict[str, str] = {}
