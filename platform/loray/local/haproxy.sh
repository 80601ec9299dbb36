#!/bin/sh
# HAProxy as Ray Serve's controller starts it: "$@" has -f CONFIGURATION. Ray's template lets statistics and metrics
# listen on every interface; here they get sockets beside the configuration, which only this user can reach. It switches
# splicing on, with which HAProxy 2.8 leaves streams of a lost gateway without an end and its threads busy with them: -dS.
# Its clients may take an hour for a byte, and for ever for a request's headers; here 120 s and 10 s.
# And where a gateway was lost before it answered, or none runs, it says so in words alone; here in OpenAI's form.
#
# Ray starts HAProxy without routes and gives them with a reload (-sf), a second or more later. Until then each path was
# a 404, which no client sends again. Here one that is started anew begins with the routes that the last one had, and
# one without routes answers 503.
set -e
previous=
is_reload=
for argument; do
    if [ "$previous" = -f ]; then configuration=$argument; fi
    if [ "$argument" = -sf ]; then is_reload=1; fi
    previous=$argument
done
folder=$(dirname "$configuration")
kept=$folder/routes.cfg
if grep -q '^ *use_backend ' "$configuration"; then
    cp "$configuration" "$kept.new"
    mv "$kept.new" "$kept"
elif [ -z "$is_reload" ] && [ -f "$kept" ]; then
    cp "$kept" "$configuration"
else
    sed -i '/^backend default_backend$/,/^backend /s|^\( *\)http-request return status 404 .*|\1http-request deny deny_status 503|' \
        "$configuration"
fi
sed -i \
    -e "s|^\( *\)timeout client .*|\1timeout client ${RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S:-120}s|" \
    -e '/^ *timeout http-\(request\|keep-alive\) /d' \
    -e 's|^defaults$|&\n    timeout http-request 10s\n    timeout http-keep-alive 75s|' \
    -e "s|^\( *\)bind \*:${RAY_SERVE_HAPROXY_STATS_PORT:-8404}\$|\1bind unix@$folder/stats.sock mode 600|" \
    -e "s|^\( *\)bind :${RAY_SERVE_HAPROXY_METRICS_PORT:-9101}\$|\1bind unix@$folder/prom.sock mode 600|" \
    "$configuration"
error='{"error":{"message":"the gateway of this request was lost, or none runs; send it again","type":"server_error","param":null,"code":"engine_unavailable"}}'
{
    printf 'HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n' "${#error}"
    printf 'Cache-Control: no-cache\r\nRetry-After: 1\r\n\r\n%s' "$error"
} >"$folder/500.http" # which Ray's template names for 502, 503 and 504
exec @HAPROXY@ -dS "$@"
