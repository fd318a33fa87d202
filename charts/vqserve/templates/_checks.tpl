{{- /* Combinations that cannot work, each with its remedy; single values are the schema's affair. */ -}}
{{- define "vqserve.checks" -}}
{{- include "vqserve.checks.name" . -}}
{{- include "vqserve.checks.engine" . -}}
{{- include "vqserve.checks.arguments" . -}}
{{- include "vqserve.checks.model" . -}}
{{- include "vqserve.checks.replicas" . -}}
{{- include "vqserve.checks.exposure" . -}}
{{- include "vqserve.checks.loadtest" . -}}
{{- include "vqserve.checks.apis" . -}}
{{- end -}}

{{- define "vqserve.checks.name" -}}
{{- if regexMatch "^[0-9]" (include "vqserve.fullname" .) -}}
  {{- fail (printf "%s begins with a digit, and no Service's name may: set fullnameOverride" (include "vqserve.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.checks.loadtest" -}}
{{- if and .Values.loadtest.enabled (not .Values.loadtest.profileToml) (eq .Values.loadtest.profile "saturation") (gt (int64 .Values.loadtest.workers) 1) -}}
  {{- fail (printf "loadtest.profile is saturation, a search that judges its own records, and loadtest.workers is %d: set loadtest.workers to 1" (int64 .Values.loadtest.workers)) -}}
{{- end -}}
{{- if and .Values.loadtest.hostHeader (not .Values.loadtest.host) -}}
  {{- fail "loadtest.hostHeader is set and loadtest.host is empty: set loadtest.host to the ingress's address, as http://traefik.ingress.svc" -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.checks.engine" -}}
{{- $ranks := include "vqserve.engine.ranks" . | int64 -}}
{{- if eq .Values.engine.device "cpu" -}}
  {{- if gt (int64 .Values.engine.gpus) 0 -}}
    {{- fail (printf "engine.gpus is %d and engine.device is cpu: set engine.gpus to 0, or engine.device to cuda" (int64 .Values.engine.gpus)) -}}
  {{- end -}}
  {{- if eq .Values.engine.attention "sparse" -}}
    {{- fail "engine.attention is sparse, which vLLM has on GPUs only: set it to dense, or engine.device to cuda" -}}
  {{- end -}}
  {{- if .Values.engine.gpuMemoryUtilization -}}
    {{- fail "engine.gpuMemoryUtilization is set and engine.device is cpu: leave it out; VLLM_CPU_KVCACHE_SPACE in engine.env is the GiB of KV cache there" -}}
  {{- end -}}
  {{- if .Values.scheduling.dra.enabled -}}
    {{- fail "scheduling.dra claims GPUs and engine.device is cpu: set scheduling.dra.enabled to false" -}}
  {{- end -}}
{{- else -}}
  {{- if eq (int64 .Values.engine.gpus) 0 -}}
    {{- fail "engine.gpus is 0 and engine.device is cuda: set engine.gpus to the GPUs of a replica, or engine.device to cpu" -}}
  {{- end -}}
  {{- if ne $ranks (int64 .Values.engine.gpus) -}}
    {{- fail (printf "engine.tensorParallelSize is %d and engine.gpus is %d: each rank takes one GPU; make them equal, or leave engine.tensorParallelSize out" $ranks (int64 .Values.engine.gpus)) -}}
  {{- end -}}
{{- end -}}
{{- if and (ne .Values.engine.attention "sparse") (gt (int64 .Values.engine.maxModelLen) 4096) -}}
  {{- fail (printf "engine.maxModelLen is %d, and dense attention is validated up to 4096: set it to at most 4096, or engine.attention to sparse" (int64 .Values.engine.maxModelLen)) -}}
{{- end -}}
{{- if and .Values.engine.expertParallel (lt $ranks 2) -}}
  {{- fail "engine.expertParallel spreads experts over ranks, and there is one rank: set it to false, or raise engine.gpus" -}}
{{- end -}}
{{- if and (eq .Values.engine.pcie "noP2P") (lt (int64 .Values.engine.gpus) 2) -}}
  {{- fail (printf "engine.pcie is noP2P, and with engine.gpus %d no GPU talks to another: set it to default" (int64 .Values.engine.gpus)) -}}
{{- end -}}
{{- if gt (int64 .Values.engine.warmUpSeconds) (int64 .Values.probes.startup.budgetSeconds) -}}
  {{- fail (printf "engine.warmUpSeconds is %d, more than probes.startup.budgetSeconds, which is %d and for loading too: raise that, or lower engine.warmUpSeconds" (int64 .Values.engine.warmUpSeconds) (int64 .Values.probes.startup.budgetSeconds)) -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.checks.arguments" -}}
{{- $values := dict
  "model" "model.source" "host" "nothing instead: pods listen on all addresses" "port" "service.port"
  "served-model-name" "engine.servedModelName" "max-model-len" "engine.maxModelLen"
  "tensor-parallel-size" "engine.gpus" "tp" "engine.gpus" "ep" "engine.expertParallel" "shutdown-timeout" "drain.seconds"
  "gpu-memory-utilization" "engine.gpuMemoryUtilization" "enable-expert-parallel" "engine.expertParallel"
  "disable-custom-all-reduce" "engine.pcie" "otlp-traces-endpoint" "tracing.endpoint"
  "api-key" "auth.existingSecret, which keeps the key out of command lines" -}}
{{- range .Values.engine.extraArgs -}}
  {{- $option := splitList "=" . | first | replace "_" "-" | trimPrefix "-" | trimPrefix "-" -}}
  {{- if and (hasPrefix "-" .) (hasKey $values $option) -}}
    {{- fail (printf "engine.extraArgs has %s: take it out and set %s" (splitList "=" . | first) (get $values $option)) -}}
  {{- end -}}
  {{- if and (eq $option "custom-histogram-buckets") $.Values.monitoring.rules.enabled -}}
    {{- fail "engine.extraArgs has --custom-histogram-buckets, and rules read the bounds that vLLM has by itself: take it out, or set monitoring.rules.enabled to false" -}}
  {{- end -}}
{{- end -}}
{{- $ours := list -}}
{{- range include "vqserve.engine.ownEnv" . | fromYamlArray -}}
  {{- $ours = append $ours .name -}}
{{- end -}}
{{- range .Values.engine.env -}}
  {{- if eq .name "VLLM_API_KEY" -}}
    {{- fail "engine.env has VLLM_API_KEY: take it out and set auth.existingSecret" -}}
  {{- else if has .name $ours -}}
    {{- fail (printf "engine.env has %s, which the chart sets: take it out; caches are set by cache, NCCL_P2P_DISABLE by engine.pcie, OTEL_ by tracing" .name) -}}
  {{- end -}}
{{- end -}}
{{- $resources := .Values.resources | default dict -}}
{{- if or (hasKey ($resources.limits | default dict) "nvidia.com/gpu") (hasKey ($resources.requests | default dict) "nvidia.com/gpu") -}}
  {{- fail "resources has nvidia.com/gpu: take it out; engine.gpus sets it" -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.checks.model" -}}
{{- $needs := dict
  "pvc" (list .Values.model.pvc.claimName "model.pvc.claimName")
  "hostPath" (list .Values.model.hostPath.path "model.hostPath.path")
  "oci" (list .Values.model.oci.reference "model.oci.reference")
  "download" (list .Values.model.download.url "model.download.url") -}}
{{- $need := get $needs .Values.model.source -}}
{{- if not (first $need) -}}
  {{- fail (printf "model.source is %s and %s is empty: set it, or choose another model.source" .Values.model.source (last $need)) -}}
{{- end -}}
{{- range $source, $other := $needs -}}
  {{- if and (ne $source $.Values.model.source) (first $other) -}}
    {{- fail (printf "%s is set and model.source is %s: set model.source to %s, or leave %s empty" (last $other) $.Values.model.source $source (last $other)) -}}
  {{- end -}}
{{- end -}}
{{- if and (eq .Values.model.source "hostPath") (ne .Values.podSecurity.standard "privileged") -}}
  {{- fail (printf "model.source is hostPath, which PodSecurity %s refuses: take a local PersistentVolume (model.source pvc), or label the namespace pod-security.kubernetes.io/enforce=privileged and set podSecurity.standard to privileged" .Values.podSecurity.standard) -}}
{{- end -}}
{{- if and (eq .Values.model.source "oci") (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
  {{- fail (printf "model.source is oci, and Kubernetes %s has no image volumes that PodSecurity admits: take 1.33 or later with the feature gate ImageVolume, or another model.source; `helm template` has to be told what the cluster is: --kube-version" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.checks.replicas" -}}
{{- $replicas := include "vqserve.maxReplicas" . | int64 -}}
{{- if ne .Values.autoscaling.kind "none" -}}
  {{- if gt (int64 .Values.replicaCount) 1 -}}
    {{- fail (printf "replicaCount is %d and autoscaling.kind is %s: leave replicaCount out and set autoscaling.minReplicas, or autoscaling.kind to none" (int64 .Values.replicaCount) .Values.autoscaling.kind) -}}
  {{- end -}}
  {{- if gt (int64 .Values.autoscaling.minReplicas) (int64 .Values.autoscaling.maxReplicas) -}}
    {{- fail (printf "autoscaling.minReplicas is %d, more than autoscaling.maxReplicas, which is %d: lower one or raise the other" (int64 .Values.autoscaling.minReplicas) (int64 .Values.autoscaling.maxReplicas)) -}}
  {{- end -}}
  {{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.keda.serverAddress) -}}
    {{- fail "autoscaling.kind is keda and autoscaling.keda.serverAddress is empty: set it to the Prometheus that KEDA is to ask" -}}
  {{- end -}}
  {{- if and (eq .Values.autoscaling.kind "keda") (not .Values.monitoring.serviceMonitor.enabled) -}}
    {{- fail "autoscaling.kind is keda, and what it asks Prometheus for has the labels that a ServiceMonitor gives: set monitoring.serviceMonitor.enabled, too" -}}
  {{- end -}}
  {{- if and .Values.autoscaling.keda.authenticationRef (not .Values.autoscaling.keda.authModes) -}}
    {{- fail "autoscaling.keda.authenticationRef is set and autoscaling.keda.authModes is empty: set it to what Prometheus is sent, as bearer, basic or tls" -}}
  {{- end -}}
{{- end -}}
{{- if gt $replicas 1 -}}
  {{- if and (eq .Values.model.source "download") (not (has "ReadWriteMany" .Values.model.download.volume.accessModes)) -}}
    {{- fail (printf "model.download.volume.accessModes lacks ReadWriteMany, and %d replicas on several nodes are to share the volume: add it, with a storage class that has it, or fetch the checkpoint once on each node and use model.source pvc or hostPath" $replicas) -}}
  {{- end -}}
  {{- if and (eq .Values.cache.kind "pvc") (not .Values.cache.existingClaim) (not (has "ReadWriteMany" .Values.cache.accessModes)) -}}
    {{- fail (printf "cache.accessModes lacks ReadWriteMany, and %d replicas on several nodes are to share the volume: add it, with a storage class that has it, or set cache.kind to emptyDir" $replicas) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.checks.exposure" -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
  {{- fail "ingress.enabled without ingress.hosts would answer for every host name: name at least one" -}}
{{- end -}}
{{- if and .Values.route.enabled (not .Values.route.parentRefs) -}}
  {{- fail "route.enabled without route.parentRefs belongs to no gateway: name one, as [{name: my-gateway}]" -}}
{{- end -}}
{{- if .Values.inferencePool.enabled -}}
  {{- if not .Values.inferencePool.endpointPicker.name -}}
    {{- fail "inferencePool.enabled without inferencePool.endpointPicker.name: install an endpoint picker and name its Service" -}}
  {{- end -}}
  {{- if not .Values.route.enabled -}}
    {{- fail "inferencePool.enabled and nothing routes to the pool: set route.enabled and route.parentRefs, too" -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.monitoring.rules.enabled (not .Values.monitoring.serviceMonitor.enabled) -}}
  {{- fail "monitoring.rules.enabled and nothing scrapes what the rules look at: set monitoring.serviceMonitor.enabled, too" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.tracing.endpoint (not .Values.networkPolicy.egress) -}}
  {{- fail "tracing.endpoint is set and networkPolicy lets nothing out: allow the collector in networkPolicy.egress" -}}
{{- end -}}
{{- if and .Values.scheduling.products (hasKey (.Values.scheduling.affinity | default dict) "nodeAffinity") (eq .Values.engine.device "cuda") -}}
  {{- fail "scheduling.affinity has a nodeAffinity, which scheduling.products makes as well: set scheduling.products to [] and say all of it in scheduling.affinity" -}}
{{- end -}}
{{- end -}}

{{- /* APIs that are not in every cluster. `helm template` knows a cluster's only if told. */ -}}
{{- define "vqserve.checks.apis" -}}
{{- $wanted := list
  (list .Values.monitoring.serviceMonitor.enabled "monitoring.serviceMonitor.enabled" "monitoring.coreos.com/v1" "ServiceMonitor" "the Prometheus operator's CRDs")
  (list .Values.monitoring.rules.enabled "monitoring.rules.enabled" "monitoring.coreos.com/v1" "PrometheusRule" "the Prometheus operator's CRDs")
  (list .Values.route.enabled "route.enabled" "gateway.networking.k8s.io/v1" "HTTPRoute" "Gateway API's CRDs")
  (list .Values.inferencePool.enabled "inferencePool.enabled" "inference.networking.k8s.io/v1" "InferencePool" "the CRDs of Gateway API's inference extension")
  (list (eq .Values.autoscaling.kind "keda") "autoscaling.kind keda" "keda.sh/v1alpha1" "ScaledObject" "KEDA")
  (list .Values.scheduling.dra.enabled "scheduling.dra.enabled" "resource.k8s.io/v1" "ResourceClaimTemplate" "Kubernetes 1.34") -}}
{{- range $wanted -}}
  {{- $api := printf "%s/%s" (index . 2) (index . 3) -}}
  {{- if and (index . 0) (not ($.Capabilities.APIVersions.Has $api)) -}}
    {{- fail (printf "%s needs %s, which this cluster does not have: install %s first, or switch it off; `helm template` has to be told what the cluster has: --api-versions %s" (index . 1) $api (index . 4) $api) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
