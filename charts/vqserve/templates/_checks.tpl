{{- define "vqserve.checks" -}}
{{- end -}}
