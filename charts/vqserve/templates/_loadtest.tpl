{{- /* Of both Jobs by the hash of their pods, and short enough for a label. Takes a dict of `root` and `part`. */ -}}
{{- define "vqserve.loadtest.name" -}}
{{- $pods := list .root.Values.loadtest.profileToml -}}
{{- range list true false -}}
  {{- $pods = append $pods (include "vqserve.loadtest.pod" (dict "root" $.root "master" . "name" "")) -}}
{{- end -}}
{{- printf "%s-%s-%d-%s" (include "vqserve.fullname" .root) .part .root.Release.Revision (join "" $pods | sha256sum | trunc 8) -}}
{{- end -}}

{{- /* Takes a dict of `root`, `master` (or a worker) and the `name` of the master's Job and Service. */ -}}
{{- define "vqserve.loadtest.pod" -}}
{{- $root := .root -}}
{{- $service := printf "http://%s:%d" (include "vqserve.fullname" $root) (int64 $root.Values.service.port) -}}
{{- $component := .master | ternary "loadtest-master" "loadtest-worker" -}}
metadata:
  labels:
    {{- include "vqserve.selectorLabels" (dict "root" $root "component" $component) | nindent 4 }}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- include "vqserve.podSecurityContext" $root | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.loadtest.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.loadtest.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: locust
      image: {{ include "vqserve.loadtestImage" $root }}
      imagePullPolicy: {{ $root.Values.loadtest.image.pullPolicy }}
      securityContext:
        {{- include "vqserve.opsSecurityContext" $root | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      command: [locust]
      {{- if .master }}
      args:
        - --master
        - --headless
        - --only-summary
        - --expect-workers
        - {{ $root.Values.loadtest.workers | int64 | quote }}
        - --expect-workers-max-wait
        - "600"
        - --wait-s
        - {{ $root.Values.probes.startup.budgetSeconds | int64 | quote }}
        - --host
        - {{ $root.Values.loadtest.host | default $service | quote }}
      {{- with $root.Values.loadtest.hostHeader }}
        - --host-header
        - {{ . | quote }}
      {{- end }}
        - --model
        - {{ $root.Values.engine.servedModelName | quote }}
        - --metrics-url
        - {{ $root.Values.loadtest.metricsUrl | default (printf "%s/metrics" $service) | quote }}
        - --load-profile
        - {{ empty $root.Values.loadtest.profileToml | ternary $root.Values.loadtest.profile "/profile/own.toml" | quote }}
        - --slo
        - {{ $root.Values.loadtest.slo | quote }}
        - --records
        - /results
        # The Job's name comes again when the release is installed anew, and a claim may hold the run of that name.
        - --run-name
        - $(RUN)
      {{- else }}
      args: [--worker, --master-host, {{ .name }}]
      {{- end }}
      {{- if or .master $root.Values.auth.existingSecret }}
      env:
        {{- if .master }}
        - {name: LOADTEST_LOCK, value: /handover/lock}
        - {name: RUN, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        {{- end }}
        {{- with include "vqserve.apiKey" $root }}
        {{- . | nindent 8 }}
        {{- end }}
      {{- end }}
      {{- if .master }}
      ports:
        - {name: locust, containerPort: 5557}
      {{- end }}
      resources:
        {{- toYaml ($root.Values.loadtest.resources | default dict) | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if .master }}
        - {name: results, mountPath: /results}
        - {name: handover, mountPath: /handover}
        {{- end }}
        {{- if $root.Values.loadtest.profileToml }}
        - {name: profile, mountPath: /profile, readOnly: true}
        {{- end }}
    {{- if .master }}
    # Prints the page once the other container has ended: `kubectl logs` fetches it from here.
    - name: report
      image: {{ include "vqserve.loadtestImage" $root }}
      imagePullPolicy: {{ $root.Values.loadtest.image.pullPolicy }}
      securityContext:
        {{- include "vqserve.opsSecurityContext" $root | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      command: [python, -m, loadtest.handover, /handover/lock, /results/$(RUN)/report.html]
      env:
        - {name: RUN, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
      resources:
        requests: {cpu: 10m, memory: 32Mi}
        limits: {memory: 128Mi}
      volumeMounts:
        - {name: results, mountPath: /results, readOnly: true}
        - {name: handover, mountPath: /handover}
    {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if .master }}
    - name: handover
      emptyDir: {}
    - name: results
      {{- if $root.Values.loadtest.resultsClaim }}
      persistentVolumeClaim:
        claimName: {{ $root.Values.loadtest.resultsClaim | quote }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- end }}
    {{- if $root.Values.loadtest.profileToml }}
    - name: profile
      configMap:
        name: {{ .name }}
    {{- end }}
{{- end -}}
