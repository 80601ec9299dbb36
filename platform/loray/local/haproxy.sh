#!/bin/sh
# HAProxy as Ray Serve's controller starts it: "$@" has -f CONFIGURATION. Ray's template lets statistics and metrics
# listen on every interface; here they get sockets beside the configuration, which only this user can reach. It switches
# splicing on, with which HAProxy 2.8 leaves streams of a lost gateway without an end and its threads busy with them: -dS.
# And where a gateway was lost before it answered, or none runs, it says so in words alone; here in OpenAI's form.
set -e
previous=
for argument; do
    if [ "$previous" = -f ]; then configuration=$argument; fi
    previous=$argument
done
folder=$(dirname "$configuration")
sed -i \
    -e "s|^\( *\)bind \*:${RAY_SERVE_HAPROXY_STATS_PORT:-8404}\$|\1bind unix@$folder/stats.sock mode 600|" \
    -e "s|^\( *\)bind :${RAY_SERVE_HAPROXY_METRICS_PORT:-9101}\$|\1bind unix@$folder/prom.sock mode 600|" \
    "$configuration"
error='{"error":{"message":"the gateway of this request was lost, or none runs; send it again","type":"server_error","param":null,"code":"engine_unavailable"}}'
{
    printf 'HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n' "${#error}"
    printf 'Cache-Control: no-cache\r\nRetry-After: 1\r\n\r\n%s' "$error"
} >"$folder/500.http" # which Ray's template names for 502, 503 and 504
exec @HAPROXY@ -dS "$@"
