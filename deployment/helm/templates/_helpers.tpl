{{- define "mii-serve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "mii-serve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "mii-serve.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mii-serve.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mii-serve.selector" -}}
app.kubernetes.io/name: {{ include "mii-serve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mii-serve.labels" -}}
{{ include "mii-serve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "mii-serve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "mii-serve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "mii-serve.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* What kubelet waits before it kills: the preStop sleep, the drain, and what comes after it. */}}
{{- define "mii-serve.gracePeriod" -}}
{{- add .Values.preStopSeconds (ceil .Values.config.drain_timeout_s) .Values.shutdownMarginSeconds -}}
{{- end -}}

{{- define "mii-serve.numGpus" -}}
{{- mul .Values.config.replicas .Values.config.tensor_parallel -}}
{{- end -}}

{{/* The settings file: what the operator says, and what belongs to the chart. */}}
{{- define "mii-serve.config" -}}
{{- $own := dict "host" "0.0.0.0" "grpc_port" (int .Values.ports.grpc) "http_port" (int .Values.ports.http) -}}
{{- if .Values.secrets.apiKeys -}}{{- $_ := set $own "api_key_file" "/etc/mii_serve/api-keys/keys" -}}{{- end -}}
{{- if .Values.secrets.tls -}}
{{- $_ := set $own "tls_cert" "/etc/mii_serve/tls/tls.crt" -}}
{{- $_ := set $own "tls_key" "/etc/mii_serve/tls/tls.key" -}}
{{- end -}}
{{- merge $own .Values.config | toYaml -}}
{{- end -}}

{{- define "mii-serve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "mii-serve.hubEnv" -}}
- {name: HF_HOME, value: /models}
{{- if .Values.modelCache.endpoint }}
- {name: HF_ENDPOINT, value: {{ .Values.modelCache.endpoint | quote }}}
{{- end }}
{{- if .Values.secrets.hubToken }}
- {name: HF_TOKEN_PATH, value: /etc/mii_serve/hub/token}
{{- end }}
{{- end -}}

{{- define "mii-serve.replicasQuery" -}}
sum(mii_serve_queued_work_seconds{namespace="{{ .Release.Namespace }}", service="{{ include "mii-serve.fullname" . }}"}) / {{ .Values.config.replicas }}
{{- end -}}
