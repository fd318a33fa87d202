"""The chart's values, stated once: `generate.py` writes values.yaml, its schema and the README's table from this.

A field's description is what people read, so it says what is chosen and what for; whatever spans several values is
checked by the chart's templates (`templates/_checks.tpl`), which can say the remedy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Free = dict[str, Any]
"""An object that Kubernetes defines: the API server checks it."""
FreeList = list[Free]
Names = dict[str, str]
"""Labels or annotations."""

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[int, Field(ge=1, le=86400)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$")]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]
AccessModes = Annotated[
    list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]], Field(min_length=1)
]
SharedAccessModes = Annotated[list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]], Field(min_length=1)]
"""Of a volume that more than one pod mounts."""
Digest = Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")]
Name = Annotated[str, Field(pattern="^([a-z]([-a-z0-9]{0,38}[a-z0-9])?)?$")]
"""Part of a Service's name, or empty."""


class Section(BaseModel):
    """Part of the values with our own keys: others are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineImage(Section):
    repository: str = Field(
        "ghcr.io/vqserve/serve",
        description="With the registry or its mirror; on CPUs the `serve-cpu` image.",
        min_length=1,
    )
    tag: str = Field(
        "", description="Empty: the chart's appVersion, on GPUs with `-dense` or `-sparse` as engine.attention has it."
    )
    digest: Digest = Field("", description="`sha256:...`; has the last word over the tag.")
    pullPolicy: PullPolicy = Field("IfNotPresent", description="When nodes ask the registry.")


class OpsImage(Section):
    repository: str = Field("ghcr.io/vqserve/ops", description="With the registry, or a mirror of it.", min_length=1)
    tag: str = Field("", description="Empty: the chart's appVersion.")
    digest: Digest = Field("", description="`sha256:...`; has the last word over the tag.")
    pullPolicy: PullPolicy = Field("IfNotPresent", description="When nodes ask the registry.")


class ModelClaim(Section):
    claimName: str = Field("", description="An existing PersistentVolumeClaim, local volumes included.")
    subPath: str = Field("", description="Folder of the checkpoint in the volume; empty: its root.")


class ModelHostPath(Section):
    path: str = Field("", description="Folder of the checkpoint, the same on every node that may run the engine.")


class ModelOci(Section):
    reference: str = Field("", description="An image that holds the checkpoint at its root; pin it by digest.")
    pullPolicy: PullPolicy = Field("IfNotPresent", description="When nodes ask the registry.")


class TokenSecret(Section):
    name: str = Field("", description="An existing Secret; empty: the source asks for no token.")
    key: str = Field("token", description="Its key that holds the token.")


class DownloadVolume(Section):
    size: Quantity = Field("250Gi", description="Of the claim that the chart makes: checkpoint and some room.")
    storageClassName: str = Field("", description="Empty: the cluster's default.")
    accessModes: SharedAccessModes = Field(
        ["ReadWriteOnce"], description="`ReadWriteMany` if several replicas are to share the volume."
    )


class ModelDownload(Section):
    url: str = Field("", description="Where the checkpoint is, as `vqserve-ops stage` takes it.")
    manifestSha256: str = Field(
        "",
        description="sha256 of the checkpoint's manifest, which itself holds those of all files; empty: not compared.",
        pattern="^([0-9a-f]{64})?$",
    )
    tokenSecret: TokenSecret = Field(TokenSecret(), description="Token for the source.")
    env: FreeList = Field([], description="More environment of the download, such as `https_proxy`.")
    volume: DownloadVolume = Field(DownloadVolume(), description="Where the checkpoint is kept.")
    budgetSeconds: Seconds = Field(
        21600, description="For the download; the rollout's deadline is later by as much, and then it has failed."
    )
    keep: bool = Field(True, description="`helm uninstall` leaves the claim: what it holds takes long to fetch.")


class Model(Section):
    source: Literal["pvc", "hostPath", "oci", "download"] = Field(
        "pvc", description="Where the checkpoint comes from; the section of that name says more, the others stay as is."
    )
    readOnly: bool = Field(
        True,
        description="With source pvc: attach the claim read-only. The engine's mount is read-only in any case; false is"
        " for storage that cannot attach so.",
    )
    pvc: ModelClaim = Field(ModelClaim(), description="An existing claim.")
    hostPath: ModelHostPath = Field(
        ModelHostPath(), description="A folder of the node, which only PodSecurity `privileged` admits."
    )
    oci: ModelOci = Field(ModelOci(), description="An OCI image as a volume (Kubernetes 1.33, feature ImageVolume).")
    download: ModelDownload = Field(
        ModelDownload(),
        description="A Job fetches the checkpoint into a claim; it resumes, and checks sha256 and room.",
    )


class Engine(Section):
    device: Literal["cuda", "cpu"] = Field("cuda", description="`cpu` serves small models, for trials.")
    servedModelName: str = Field("glm-5.2", description="What requests call the model.", pattern="^[A-Za-z0-9._/:-]+$")
    maxModelLen: Positive = Field(
        4096, description="Context in tokens, prompt and answer together. Dense attention is validated up to 4096."
    )
    gpus: int = Field(2, description="GPUs of one node for each replica; 0 on CPUs.", ge=0, le=16)
    tensorParallelSize: Positive | None = Field(None, description="Ranks; null: one for each GPU.")
    expertParallel: bool = Field(False, description="Ranks hold whole experts instead of a part of each.")
    attention: Literal["auto", "dense", "sparse"] = Field("auto", description="`auto` means dense.")
    gpuMemoryUtilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of each GPU's memory that vLLM may take; null: vLLM's default."
    )
    pcie: Literal["default", "noP2P"] = Field(
        "default",
        description="`noP2P` if two GPUs hang in the first all-reduce: NCCL_P2P_DISABLE=1 and no custom all-reduce.",
    )
    env: FreeList = Field([], description="More variables of the engine's container, as Kubernetes takes them.")
    extraArgs: list[str] = Field([], description="More options of vLLM's server, which follow `--` and win.")
    warmUpSeconds: Seconds = Field(600, description="How long the known answers may take before `/ready` gives up.")
    thinkingBudget: int = Field(
        0, description="Tokens after which thinking is closed where a request does not say; 0: no limit.", ge=0
    )
    antiRepetition: str = Field(
        "",
        description="Penalty on prolonging a repetition, as `STRENGTH[,MIN_LENGTH[,WINDOW]]`; empty: off.",
        pattern=r"^([0-9]+(\.[0-9]+)?(,[0-9]+(,[0-9]+)?)?)?$",
    )
    stallSeconds: Seconds = Field(
        120, description="How long an engine with requests may make no step until `/live` fails and it is restarted."
    )


class Dra(Section):
    enabled: bool = Field(False, description="Claim GPUs by dynamic resource allocation, not as `nvidia.com/gpu`.")
    deviceClassName: str = Field("gpu.nvidia.com", description="The driver's device class.")
    selectors: FreeList = Field([], description="Selectors (CEL) of the claim's request.")


class Scheduling(Section):
    productLabel: str = Field("nvidia.com/gpu.product", description="Label in which nodes name their GPU.")
    products: list[str] = Field(
        [
            "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
            "NVIDIA-RTX-PRO-6000-Blackwell-Workstation-Edition",
            "NVIDIA-RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition",
        ],
        description="GPUs to run on, as that label has them; empty: any. Not looked at on CPUs.",
    )
    nodeSelector: Names = Field({}, description="Labels that nodes must have.")
    affinity: Free = Field({}, description="More affinity; for a nodeAffinity of your own empty `products`.")
    tolerations: FreeList = Field(
        [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}], description="Of nodes' taints."
    )
    topologySpreadConstraints: FreeList = Field([], description="How replicas spread; GPUs spread them by themselves.")
    priorityClassName: str = Field("", description="An existing PriorityClass.")
    runtimeClassName: str = Field("", description="`nvidia` where that is not the nodes' default runtime.")
    dra: Dra = Field(Dra(), description="Dynamic resource allocation (resource.k8s.io/v1, Kubernetes 1.34).")


class Shm(Section):
    size: Quantity = Field("8Gi", description="Of /dev/shm, which is memory and counts as the container's.")


class Cache(Section):
    kind: Literal["emptyDir", "pvc"] = Field(
        "emptyDir", description="`emptyDir` lives as long as the pod, and survives restarts of its container."
    )
    size: Quantity = Field("20Gi", description="Limit of the emptyDir, or size of the claim that the chart makes.")
    existingClaim: str = Field("", description="With kind pvc: take this claim instead of making one.")
    storageClassName: str = Field("", description="Empty: the cluster's default.")
    accessModes: AccessModes = Field(["ReadWriteOnce"], description="Of the claim that the chart makes.")


class StartupProbe(Section):
    budgetSeconds: Seconds = Field(1800, description="For loading, compiling and warm-up; then the start has failed.")
    periodSeconds: Seconds = Field(5, description="Between two questions.")


class ReadinessProbe(Section):
    periodSeconds: Seconds = Field(5, description="Between two questions.")
    failureThreshold: Positive = Field(2, description="Failures in a row until no new requests come.")


class LivenessProbe(Section):
    path: str = Field(
        "/live",
        description="What is asked: `/live` fails once an engine with requests makes no step for engine.stallSeconds.",
        pattern="^/",
    )
    periodSeconds: Seconds = Field(10, description="Between two questions.")
    failureThreshold: Positive = Field(3, description="Failures in a row until the container is restarted.")
    terminationGracePeriodSeconds: Seconds = Field(
        10, description="For a container that is restarted so: waiting out a whole drain would help nobody."
    )


class Probes(Section):
    timeoutSeconds: Seconds = Field(5, description="For an answer: a saturated engine is not a dead one.")
    startup: StartupProbe = Field(StartupProbe(), description="Asks `/ready` until the first yes.")
    readiness: ReadinessProbe = Field(ReadinessProbe(), description="Asks `/ready`.")
    liveness: LivenessProbe = Field(LivenessProbe(), description="Whether the container has to be restarted.")


class Service(Section):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field("ClusterIP", description="As Kubernetes has it.")
    port: int = Field(80, description="Of the Service; the engine's own is 8001.", ge=1, le=65535)
    annotations: Names = Field({}, description="Of the Service.")


class Ingress(Section):
    enabled: bool = Field(False, description="Route /v1, and nothing else, from an ingress controller.")
    className: str = Field("", description="Empty: the cluster's default.")
    hosts: list[str] = Field([], description="Host names.")
    tlsSecretName: str = Field("", description="Secret of a certificate for all hosts; empty: no TLS here.")
    annotations: Names = Field(
        {}, description="Added to those that switch ingress-nginx to unbuffered, patient proxying; these win."
    )


class Route(Section):
    enabled: bool = Field(False, description="Route /v1, and nothing else, from a gateway (HTTPRoute).")
    parentRefs: FreeList = Field([], description="The gateways.")
    hostnames: list[str] = Field([], description="Host names; empty: all of the gateway's.")
    tls: bool = Field(True, description="The gateway's listener does TLS; only for the address in helm's notes.")
    annotations: Names = Field({}, description="Of the HTTPRoute.")


class Auth(Section):
    existingSecret: str = Field("", description="Secret with the API key; empty: whoever reaches the port may ask.")
    key: str = Field("api-key", description="The Secret's key that holds it.")


class ServiceMonitor(Section):
    enabled: bool = Field(False, description="Have the Prometheus operator scrape `/metrics`.")
    interval: str = Field("15s", description="Between two scrapes.", pattern="^[0-9]+(ms|s|m)$")
    labels: Names = Field({}, description="By which a Prometheus selects its monitors.")


TTFT_BOUNDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
"""Upper bounds of the buckets of vLLM's `vllm:time_to_first_token_seconds`, in seconds."""
INTER_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
"""Upper bounds of the buckets of vLLM's `vllm:inter_token_latency_seconds`, in seconds."""


class Slo(Section):
    ttftSeconds: Annotated[float, WithJsonSchema({"type": "number", "enum": list(TTFT_BOUNDS)})] = Field(
        5, description="To the first token. Must be a bound of vLLM's histogram: nothing is known in between."
    )
    interTokenSeconds: Annotated[float, WithJsonSchema({"type": "number", "enum": list(INTER_TOKEN_BOUNDS)})] = Field(
        0.1, description="From one step of an answer to the next; a bound of vLLM's histogram, too."
    )
    objective: float = Field(
        0.99,
        description="Share of requests, or of steps, that are to be faster. Below 0.95 no share of slow ones would be"
        " 14.4 times too many, which is what wakes somebody.",
        ge=0.95,
        le=0.9999,
    )


class Rules(Section):
    enabled: bool = Field(False, description="Alerts and recording rules (PrometheusRule) with a runbook for each.")
    labels: Names = Field({}, description="By which a Prometheus selects its rules.")
    runbooks: str = Field(
        "https://github.com/vqserve/vqserve/blob/main/ops/runbooks",
        description="Where alerts link to: a copy of the folder ops/runbooks.",
        pattern=r"^https?://[A-Za-z0-9._~:/?&=%-]*[^/]$",
    )
    slo: Slo = Field(Slo(), description="Two promises, whose allowance of slow ones may be used up so fast only.")
    stallSeconds: Seconds = Field(60, description="Without a token while requests run, until somebody is woken.")
    waitingRequests: Positive = Field(
        16, description="Requests that may wait, of all replicas, while they become more."
    )


class Dashboards(Section):
    enabled: bool = Field(
        False,
        description="Dashboards for Grafana, a ConfigMap each. They show any release: one that brings them is enough.",
    )
    labels: Names = Field({"grafana_dashboard": "1"}, description="By which Grafana's sidecar finds ConfigMaps.")
    annotations: Names = Field({}, description="Of the ConfigMaps, as `grafana_folder: vqserve`.")


class Monitoring(Section):
    serviceMonitor: ServiceMonitor = Field(ServiceMonitor(), description="ServiceMonitor (monitoring.coreos.com).")
    rules: Rules = Field(Rules(), description="PrometheusRule (monitoring.coreos.com).")
    dashboards: Dashboards = Field(Dashboards(), description="What Grafana shows.")


class Tracing(Section):
    endpoint: str = Field("", description="OTLP endpoint for traces, as `http://collector:4317`; empty: no traces.")
    protocol: Literal["grpc", "http/protobuf"] = Field(
        "grpc", description="What the endpoint speaks; http/protobuf wants the whole path, as `:4318/v1/traces`."
    )
    ratio: float = Field(
        1.0, description="Share of requests that are traced, of those whose caller has not decided.", ge=0, le=1
    )


class Hpa(Section):
    metric: str = Field(
        "vllm_num_requests_waiting",
        description="What the cluster's metrics adapter calls `vllm:num_requests_waiting` of a pod.",
    )


class Keda(Section):
    serverAddress: str = Field("", description="Prometheus that KEDA asks, as `http://prometheus.monitoring:9090`.")
    authenticationRef: Free = Field({}, description="A TriggerAuthentication, if that wants to know who asks.")
    authModes: str = Field("", description="What that is sent as: `bearer`, `basic`, `tls`, or several with commas.")


class Autoscaling(Section):
    kind: Literal["none", "hpa", "keda"] = Field("none", description="What counts the replicas.")
    minReplicas: Positive = Field(1, description="At least this many.")
    maxReplicas: Positive = Field(2, description="At most this many: each takes the GPUs of a whole replica.")
    waitingRequests: Positive = Field(8, description="Requests that may wait for each replica before one is added.")
    hpa: Hpa = Field(Hpa(), description="HorizontalPodAutoscaler.")
    keda: Keda = Field(Keda(), description="KEDA's ScaledObject.")


class EndpointPicker(Section):
    name: str = Field("", description="Service of the endpoint picker.")
    port: int = Field(9002, description="Its port.", ge=1, le=65535)
    failureMode: Literal["FailOpen", "FailClose"] = Field("FailOpen", description="Without the picker, any replica?")


class InferencePool(Section):
    enabled: bool = Field(False, description="An InferencePool of the replicas, which the HTTPRoute then goes to.")
    endpointPicker: EndpointPicker = Field(EndpointPicker(), description="What chooses a replica; install it apart.")


class Drain(Section):
    waitSeconds: Seconds = Field(15, description="From `/ready` saying no to the stop: endpoints have to follow.")
    seconds: Seconds = Field(300, description="For running requests to finish after that.")


class NetworkPolicy(Section):
    enabled: bool = Field(False, description="Let in requests only, and out nothing but DNS.")
    sources: FreeList = Field([], description="Peers that may ask, Prometheus included; empty: all.")
    egress: FreeList = Field([], description="More rules for what the engine may reach.")


class Pdb(Section):
    enabled: bool = Field(
        False, description="Keep all replicas but one while nodes are drained; one alone is not kept."
    )


class PodSecurity(Section):
    standard: Literal["restricted", "baseline", "privileged"] = Field(
        "restricted", description="What the namespace enforces. Pods keep to `restricted` but for a hostPath."
    )
    runAsUser: int = Field(10001, description="User and group of all containers; must read the checkpoint.", ge=1)
    fsGroup: int = Field(10001, description="Group that volumes are made writable for.", ge=1)
    readOnlyRootFilesystem: bool = Field(
        False, description="Of the serving image's containers. Off, as nvidia-cdi-hook writes to it on some nodes."
    )


class Preflight(Section):
    mode: Literal["warn", "refuse", "off"] = Field(
        "warn",
        description="Judge GPUs, checkpoint and memory before a start; `warn` starts in any case. Quote `off`.",
    )


class LoadtestImage(Section):
    repository: str = Field("ghcr.io/vqserve/loadtest", description="With the registry, or its mirror.", min_length=1)
    tag: str = Field("", description="Empty: the chart's appVersion.")
    digest: Digest = Field("", description="`sha256:...`; has the last word over the tag.")
    pullPolicy: PullPolicy = Field("IfNotPresent", description="When nodes ask the registry.")


class Loadtest(Section):
    enabled: bool = Field(
        False,
        description="Load the engine once for each revision of the release; the Job fails if the SLO is broken."
        " It begins when a server answers, in a rollout maybe an old one: `helm upgrade --wait` first,"
        " then enable it in another.",
    )
    image: LoadtestImage = Field(LoadtestImage(), description="The image of the load test.")
    profile: str = Field("smoke", description="Traffic: a profile of loadtest/profiles.", pattern="^[a-z0-9-]+$")
    profileToml: str = Field("", description="A profile of your own, as the text of its TOML file; wins over profile.")
    slo: str = Field(
        "",
        description="Judged by, as `ttft_s=2,tpot_s=0.05,failures=0.01`; empty: the profile's, or none may fail.",
        pattern=r"^([a-z0-9_]+=[0-9.]+(,[a-z0-9_]+=[0-9.]+)*)?$",
    )
    workers: Positive = Field(2, description="Processes that send, a pod each; a search for saturation takes one.")
    host: str = Field(
        "", description="Where to send, as `http://traefik.ingress.svc`; empty: the Service of this release."
    )
    hostHeader: str = Field("", description="Name to ask for, where host is an ingress's own address.")
    metricsUrl: str = Field(
        "", description="Metrics to sample beside; empty: the Service's `/metrics`; `none`: nothing."
    )
    resultsClaim: str = Field(
        "",
        description="A claim to keep records and reports in, a folder for each pod of the Job; empty: the report alone,"
        " in the log of its container.",
    )
    nodeSelector: Names = Field(
        {}, description="Of its pods: nodes without engines keep both from disturbing the other."
    )
    tolerations: FreeList = Field([], description="Of its pods.")
    resources: Free = Field(
        {"requests": {"cpu": "1", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}, description="Of each of its pods."
    )


class Values(Section):
    nameOverride: Name = Field("", description="Instead of the chart's name.")
    fullnameOverride: Name = Field("", description="Instead of release and chart name.")
    replicaCount: Positive = Field(1, description="Each on GPUs of its own; leave 1 if autoscaling counts them.")
    podLabels: Names = Field({}, description="More labels of the engine's pods.")
    podAnnotations: Names = Field({}, description="Annotations of the engine's pods.")
    image: EngineImage = Field(EngineImage(), description="The serving image.")
    opsImage: OpsImage = Field(OpsImage(), description="The image of `vqserve-ops`, which downloads need.")
    imagePullSecrets: FreeList = Field([], description="As `[{name: mirror}]`.")
    model: Model = Field(Model(), description="The checkpoint.")
    engine: Engine = Field(Engine(), description="What `vqserve serve` is asked for.")
    scheduling: Scheduling = Field(Scheduling(), description="Where replicas run.")
    resources: Free = Field(
        {"requests": {"cpu": "4", "memory": "16Gi"}},
        description="Of the engine's container, without the GPUs: those are engine.gpus.",
    )
    shm: Shm = Field(Shm(), description="Shared memory of the ranks.")
    cache: Cache = Field(Cache(), description="What was compiled and tuned: a start without it takes minutes longer.")
    probes: Probes = Field(Probes(), description="What the kubelet asks.")
    service: Service = Field(Service(), description="One Service before all replicas.")
    ingress: Ingress = Field(Ingress(), description="Requests from outside by Ingress.")
    route: Route = Field(Route(), description="Requests from outside by Gateway API.")
    auth: Auth = Field(Auth(), description="The API key, only ever by reference.")
    monitoring: Monitoring = Field(Monitoring(), description="Metrics.")
    tracing: Tracing = Field(Tracing(), description="OpenTelemetry.")
    autoscaling: Autoscaling = Field(Autoscaling(), description="Replicas by the number of waiting requests.")
    inferencePool: InferencePool = Field(
        InferencePool(), description="Gateway API inference extension (inference.networking.k8s.io)."
    )
    drain: Drain = Field(Drain(), description="How a replica is stopped; its grace period is the sum and 30 s.")
    networkPolicy: NetworkPolicy = Field(NetworkPolicy(), description="Who reaches the engine, and what it reaches.")
    pdb: Pdb = Field(Pdb(), description="PodDisruptionBudget.")
    podSecurity: PodSecurity = Field(PodSecurity(), description="Who the containers run as.")
    preflight: Preflight = Field(
        Preflight(), description="`vqserve preflight`, on the GPUs and with the options that the engine will have."
    )
    loadtest: Loadtest = Field(Loadtest(), description="Locust, in the cluster.")
