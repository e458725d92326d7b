{{- define "ibex.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "ibex.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ibex.labels" -}}
{{ include "ibex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "ibex.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "ibex.serviceAccount" -}}
{{ default (include "ibex.fullname" .) .Values.serviceAccount.name }}
{{- end -}}

{{/* Longer than a stop takes: its three parts, the recorder's last delivery (5 s), and the time to end what hangs. */}}
{{- define "ibex.gracePeriod" -}}
{{ add (ceil .Values.shutdown.preStopSeconds) (ceil .Values.shutdown.delaySeconds) (ceil .Values.shutdown.timeoutSeconds) 15 }}
{{- end -}}

{{/* What a node and the migrations are told of the stores: files, each named to ibex by its `…_FILE`. */}}
{{- define "ibex.storeEnv" -}}
- name: IBEX_ENV
  value: {{ .Values.environment | quote }}
- name: IBEX_POSTGRES_DSN_FILE
  value: /run/secrets/ibex/postgres-dsn
- name: IBEX_REDIS_URL_FILE
  value: /run/secrets/ibex/redis-url
- name: IBEX_CLICKHOUSE_DSN_FILE
  value: /run/secrets/ibex/clickhouse-dsn
{{- if .Values.provider.existingSecret }}
- name: OPENAI_API_KEY_FILE
  value: /run/secrets/ibex/openai-api-key
{{- end }}
{{- end -}}

{{- define "ibex.secretSources" -}}
- secret:
    name: {{ .Values.stores.existingSecret | quote }}
    items:
      - {key: {{ .Values.stores.keys.postgresDsn | quote }}, path: postgres-dsn}
      - {key: {{ .Values.stores.keys.redisUrl | quote }}, path: redis-url}
      - {key: {{ .Values.stores.keys.clickhouseDsn | quote }}, path: clickhouse-dsn}
{{- if .Values.provider.existingSecret }}
- secret:
    name: {{ .Values.provider.existingSecret | quote }}
    items:
      - {key: {{ .Values.provider.key | quote }}, path: openai-api-key}
{{- end }}
{{- end -}}

{{- define "ibex.egress" -}}
- ports: # names
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
- ports:
    {{- range .Values.networkPolicy.stores.ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.stores.to }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
