{{- define "vqserve.model.claim" -}}
{{- eq .Values.model.source "download" | ternary (printf "%s-model" (include "vqserve.fullname" .)) .Values.model.pvc.claimName -}}
{{- end -}}

{{- define "vqserve.model.volume" -}}
{{- if eq .Values.model.source "hostPath" -}}
hostPath:
  path: {{ .Values.model.hostPath.path | quote }}
  type: Directory
{{- else if eq .Values.model.source "oci" -}}
image:
  reference: {{ .Values.model.oci.reference | quote }}
  pullPolicy: {{ .Values.model.oci.pullPolicy }}
{{- else -}}
persistentVolumeClaim:
  claimName: {{ include "vqserve.model.claim" . | quote }}
  {{- if and (eq .Values.model.source "pvc") .Values.model.readOnly }}
  readOnly: true
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "vqserve.model.mount" -}}
{{- $mount := dict "name" "model" "mountPath" "/model" "readOnly" true -}}
{{- if and (eq .Values.model.source "pvc") .Values.model.pvc.subPath -}}
{{- $_ := set $mount "subPath" .Values.model.pvc.subPath -}}
{{- end -}}
{{- toJson $mount -}}
{{- end -}}

{{- /* The source as the words of `vqserve-ops stage`. */ -}}
{{- define "vqserve.model.stageArgs" -}}
- {{ .Values.model.download.url | quote }}
- /model
{{- with .Values.model.download.manifestSha256 }}
- --manifest-sha256
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* A volume that one node at a time may attach must be filled on the node where the engine waits for it. */ -}}
{{- define "vqserve.model.stageAffinity" -}}
{{- $affinity := include "vqserve.affinity" . | fromYaml -}}
{{- if not (has "ReadWriteMany" .Values.model.download.volume.accessModes) -}}
  {{- $engine := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "vqserve.engineSelector" . | fromYaml)) -}}
  {{- $near := $affinity.podAffinity | default dict -}}
  {{- $required := append ($near.requiredDuringSchedulingIgnoredDuringExecution | default list) $engine -}}
  {{- $_ := set $affinity "podAffinity" (set $near "requiredDuringSchedulingIgnoredDuringExecution" $required) -}}
{{- end -}}
{{- toYaml $affinity -}}
{{- end -}}

{{- /* The pod that stages a download. The Job's name holds its hash: a Job's pod cannot be changed, only replaced. */ -}}
{{- define "vqserve.model.stagePod" -}}
metadata:
  labels:
    {{- include "vqserve.selectorLabels" (dict "root" . "component" "stage") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- include "vqserve.podSecurityContext" . | nindent 4 }}
  {{- include "vqserve.scheduling" (dict "root" . "affinity" (include "vqserve.model.stageAffinity" . | fromYaml)) | trim | nindent 2 }}
  containers:
    - name: stage
      image: {{ include "vqserve.opsImage" . }}
      imagePullPolicy: {{ .Values.opsImage.pullPolicy }}
      securityContext:
        {{- include "vqserve.opsSecurityContext" . | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      command: [vqserve-ops]
      args:
        - stage
        {{- include "vqserve.model.stageArgs" . | nindent 8 }}
        {{- if .Values.model.download.tokenSecret.name }}
        - --token-file
        - /token/{{ .Values.model.download.tokenSecret.key }}
        {{- end }}
      {{- with .Values.model.download.env }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        requests: {cpu: "1", memory: 1Gi}
      volumeMounts:
        - {name: model, mountPath: /model}
        - {name: tmp, mountPath: /tmp}
        {{- if .Values.model.download.tokenSecret.name }}
        - {name: token, mountPath: /token, readOnly: true}
        {{- end }}
  volumes:
    - name: model
      {{- include "vqserve.model.volume" . | nindent 6 }}
    - name: tmp
      emptyDir: {}
    {{- with .Values.model.download.tokenSecret.name }}
    - name: token
      secret:
        secretName: {{ . | quote }}
        items:
          - key: {{ $.Values.model.download.tokenSecret.key | quote }}
            path: {{ $.Values.model.download.tokenSecret.key | quote }}
    {{- end }}
{{- end -}}
