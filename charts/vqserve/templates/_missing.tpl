{{- /* What the release refers to and the cluster did not have when this was rendered; each with its remedy, a line each.
       Rendered without a cluster, that is everything. */ -}}
{{- define "vqserve.missing" -}}
{{- $space := .Release.Namespace -}}
{{- if and (eq .Values.model.source "pvc") (not (lookup "v1" "PersistentVolumeClaim" $space .Values.model.pvc.claimName)) }}
No PersistentVolumeClaim `{{ .Values.model.pvc.claimName }}` was found in namespace {{ $space }} (model.pvc.claimName): pods wait until you make it, with the checkpoint in it.
{{- end }}
{{- with .Values.cache.existingClaim }}
{{- if not (lookup "v1" "PersistentVolumeClaim" $space .) }}
No PersistentVolumeClaim `{{ . }}` was found in namespace {{ $space }} (cache.existingClaim): pods wait until you make it.
{{- end }}
{{- end }}
{{- include "vqserve.missingSecret" (dict "space" $space "name" .Values.auth.existingSecret "key" .Values.auth.key "value" "auth.existingSecret") }}
{{- if eq .Values.model.source "download" }}
{{- include "vqserve.missingSecret" (dict "space" $space "name" .Values.model.download.tokenSecret.name "key" .Values.model.download.tokenSecret.key "value" "model.download.tokenSecret") }}
{{- end }}
{{- end -}}

{{- define "vqserve.missingSecret" -}}
{{- if .name }}
{{- $secret := lookup "v1" "Secret" .space .name }}
{{- if not $secret }}
No Secret `{{ .name }}` was found in namespace {{ .space }} ({{ .value }}): kubectl --namespace {{ .space }} create secret generic {{ .name }} --from-file {{ .key }}=FILE
{{- else if not (hasKey ($secret.data | default dict) .key) }}
Secret `{{ .name }}` in namespace {{ .space }} has no key `{{ .key }}` ({{ .value }}): add it, or name another key.
{{- end }}
{{- end }}
{{- end -}}
