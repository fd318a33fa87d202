{{- define "vqserve.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end -}}

{{- /* A Service's name, which has no dots, and short enough for what is put behind it, such as a Job's hash. */ -}}
{{- define "vqserve.fullname" -}}
{{- $name := include "vqserve.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- $full = .Values.fullnameOverride | default $full -}}
{{- if gt (len $full) 40 -}}
{{- $full = printf "%s-%s" (trunc 33 $full | trimSuffix "." | trimSuffix "-") (sha256sum $full | trunc 6) -}}
{{- end -}}
{{- replace "." "-" $full -}}
{{- end -}}

{{- /* What selects, and so may never change. Takes a dict of `root` and `component`. */ -}}
{{- define "vqserve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "vqserve.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "vqserve.labels" -}}
{{ include "vqserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: vqserve
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* Labels of ours and of the user's, who may change all but those that select. Takes a dict of `root`, `component`, `ours` and
       `more`. */ -}}
{{- define "vqserve.labelsWith" -}}
{{- toYaml (merge (include "vqserve.selectorLabels" . | fromYaml) (.more | default dict) (.ours | fromYaml)) -}}
{{- end -}}

{{- define "vqserve.engine" -}}
{{- include "vqserve.labels" (dict "root" . "component" "engine") -}}
{{- end -}}

{{- /* Of pods: without the chart's version, for which alone no engine should load anew. */ -}}
{{- define "vqserve.enginePod" -}}
{{ include "vqserve.engineSelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "vqserve.engineSelector" -}}
{{- include "vqserve.selectorLabels" (dict "root" . "component" "engine") -}}
{{- end -}}

{{- define "vqserve.image" -}}
{{- $kind := eq .Values.engine.attention "sparse" | ternary "sparse" "dense" -}}
{{- $made := eq .Values.engine.device "cpu" | ternary .Chart.AppVersion (printf "%s-%s" .Chart.AppVersion $kind) -}}
{{- $tag := .Values.image.tag | default $made -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "vqserve.opsImage" -}}
{{- include "vqserve.ownImage" (list . .Values.opsImage.repository .Values.opsImage.tag .Values.opsImage.digest) -}}
{{- end -}}

{{- define "vqserve.loadtestImage" -}}
{{- include "vqserve.ownImage" (list . .Values.loadtest.image.repository .Values.loadtest.image.tag .Values.loadtest.image.digest) -}}
{{- end -}}

{{- /* Takes the root, repository, tag and digest. */ -}}
{{- define "vqserve.ownImage" -}}
{{- if last . -}}
{{- printf "%s@%s" (index . 1) (last .) -}}
{{- else -}}
{{- printf "%s:%s" (index . 1) (index . 2 | default (first .).Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- /* Of every pod. */ -}}
{{- define "vqserve.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser | int64 }}
runAsGroup: {{ .Values.podSecurity.runAsUser | int64 }}
fsGroup: {{ .Values.podSecurity.fsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- /* Of containers of the serving image; those of the ops image write to their volumes only. */ -}}
{{- define "vqserve.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.podSecurity.readOnlyRootFilesystem }}
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "vqserve.opsSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Where pods run: the engine, and the download, which has to be on nodes that the engine can run on. Takes a dict of `root`
       and `affinity`. */ -}}
{{- define "vqserve.scheduling" -}}
{{- with .root -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.scheduling.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.scheduling.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.scheduling.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "vqserve.affinity" -}}
{{- with .Values.scheduling.affinity }}
{{- toYaml . }}
{{- end }}
{{- if and (eq .Values.engine.device "cuda") .Values.scheduling.products }}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          - key: {{ .Values.scheduling.productLabel | quote }}
            operator: In
            values:
              {{- toYaml .Values.scheduling.products | nindent 14 }}
{{- end }}
{{- end -}}

{{- define "vqserve.maxReplicas" -}}
{{- eq .Values.autoscaling.kind "none" | ternary .Values.replicaCount .Values.autoscaling.maxReplicas | int64 -}}
{{- end -}}

{{- /* Paths of ours that may be asked from outside: the API key guards /v1, while /metrics and others are open. */ -}}
{{- define "vqserve.path" -}}/v1{{- end -}}
