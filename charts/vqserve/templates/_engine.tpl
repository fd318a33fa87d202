{{- /* Options of `vqserve serve`, which alone knows vLLM's: only what it has no option for follows `--`. `vqserve preflight`
       takes the same, and so judges the very server that will be started. */ -}}
{{- define "vqserve.engine.options" -}}
- --host
- 0.0.0.0
- --port
- "8001"
- --served-model-name
- {{ .Values.engine.servedModelName | quote }}
- --max-model-len
- {{ .Values.engine.maxModelLen | int64 | toString | quote }}
- --tensor-parallel-size
- {{ include "vqserve.engine.ranks" . | quote }}
- --attention
- {{ .Values.engine.attention }}
- --warm-up-seconds
- {{ .Values.engine.warmUpSeconds | int64 | toString | quote }}
- --stall-seconds
- {{ .Values.engine.stallSeconds | int64 | toString | quote }}
{{- with .Values.engine.thinkingBudget }}
- --thinking-budget
- {{ . | int64 | toString | quote }}
{{- end }}
{{- with .Values.engine.antiRepetition }}
- --anti-repetition
- {{ . | quote }}
{{- end }}
- --
- --shutdown-timeout
- {{ .Values.drain.seconds | int64 | toString | quote }}
{{- with .Values.engine.gpuMemoryUtilization }}
- --gpu-memory-utilization
- {{ . | toString | quote }}
{{- end }}
{{- if .Values.engine.expertParallel }}
- --enable-expert-parallel
{{- end }}
{{- if eq .Values.engine.pcie "noP2P" }}
- --disable-custom-all-reduce
{{- end }}
{{- with .Values.tracing.endpoint }}
- --otlp-traces-endpoint
- {{ . | quote }}
{{- end }}
{{- range .Values.engine.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "vqserve.engine.ranks" -}}
{{- .Values.engine.tensorParallelSize | default (max .Values.engine.gpus 1) | int64 -}}
{{- end -}}

{{- define "vqserve.engine.env" -}}
{{ include "vqserve.engine.ownEnv" . }}
{{- with .Values.engine.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* HOME and every cache of compiled and tuned code, then what values stand for; not the key, which only the engine needs. */ -}}
{{- define "vqserve.engine.ownEnv" -}}
- {name: HOME, value: /cache/home}
- {name: XDG_CACHE_HOME, value: /cache/xdg}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/inductor}
- {name: FLASHINFER_WORKSPACE_BASE, value: /cache/flashinfer}
- {name: CUDA_CACHE_PATH, value: /cache/cuda}
{{- if eq .Values.engine.pcie "noP2P" }}
- {name: NCCL_P2P_DISABLE, value: "1"}
{{- end }}
{{- if .Values.tracing.endpoint }}
- {name: OTEL_SERVICE_NAME, value: {{ include "vqserve.fullname" . | quote }}}
- {name: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, value: {{ .Values.tracing.protocol }}}
- {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .Values.tracing.ratio | toString | quote }}}
{{- end }}
{{- end -}}

{{- define "vqserve.apiKey" -}}
{{- if .Values.auth.existingSecret -}}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.existingSecret | quote }}
      key: {{ .Values.auth.key | quote }}
{{- end -}}
{{- end -}}

{{- /* The GPUs, for the engine and for the preflight, which looks at the very same. */ -}}
{{- define "vqserve.engine.gpus" -}}
{{- if eq .Values.engine.device "cuda" }}
{{- if .Values.scheduling.dra.enabled }}
claims:
  - name: gpus
{{- else }}
limits:
  nvidia.com/gpu: {{ .Values.engine.gpus | int64 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "vqserve.engine.resources" -}}
{{- toYaml (merge (include "vqserve.engine.gpus" . | fromYaml) (deepCopy (.Values.resources | default dict))) -}}
{{- end -}}

{{- define "vqserve.engine.mounts" -}}
- {{ include "vqserve.model.mount" . }}
- {name: cache, mountPath: /cache}
- {name: shm, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "vqserve.engine.volumes" -}}
- name: model
  {{- include "vqserve.model.volume" . | nindent 2 }}
- name: cache
  {{- if eq .Values.cache.kind "pvc" }}
  persistentVolumeClaim:
    claimName: {{ .Values.cache.existingClaim | default (printf "%s-cache" (include "vqserve.fullname" .)) | quote }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.cache.size }}
  {{- end }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shm.size }}
- name: tmp
  emptyDir: {}
{{- end -}}

{{- define "vqserve.engine.probes" -}}
startupProbe:
  httpGet: {path: /ready, port: http}
  timeoutSeconds: {{ .Values.probes.timeoutSeconds | int64 }}
  periodSeconds: {{ .Values.probes.startup.periodSeconds | int64 }}
  failureThreshold: {{ divf .Values.probes.startup.budgetSeconds .Values.probes.startup.periodSeconds | ceil | int64 }}
readinessProbe:
  httpGet: {path: /ready, port: http}
  timeoutSeconds: {{ .Values.probes.timeoutSeconds | int64 }}
  periodSeconds: {{ .Values.probes.readiness.periodSeconds | int64 }}
  failureThreshold: {{ .Values.probes.readiness.failureThreshold | int64 }}
livenessProbe:
  httpGet: {path: {{ .Values.probes.liveness.path }}, port: http}
  timeoutSeconds: {{ .Values.probes.timeoutSeconds | int64 }}
  periodSeconds: {{ .Values.probes.liveness.periodSeconds | int64 }}
  failureThreshold: {{ .Values.probes.liveness.failureThreshold | int64 }}
  terminationGracePeriodSeconds: {{ .Values.probes.liveness.terminationGracePeriodSeconds | int64 }}
{{- end -}}

{{- /* For the wait before the stop, the running requests, and 30 s for the engine to let go of the GPUs. */ -}}
{{- define "vqserve.engine.gracePeriod" -}}
{{- add .Values.drain.waitSeconds .Values.drain.seconds 30 -}}
{{- end -}}

{{- /* For one replica to stop, for the next to have its checkpoint and start, and 600 s to find a node and pull images. */ -}}
{{- define "vqserve.engine.deadline" -}}
{{- $download := eq .Values.model.source "download" | ternary .Values.model.download.budgetSeconds 0 -}}
{{- add (include "vqserve.engine.gracePeriod" .) $download .Values.probes.startup.budgetSeconds 600 -}}
{{- end -}}
