#!/bin/sh
# HAProxy as Ray Serve's controller starts it: "$@" has -f CONFIGURATION. Ray's template lets statistics and metrics
# listen on every interface; here they get sockets beside the configuration, which only this user can reach.
set -e
previous=
for argument; do
    if [ "$previous" = -f ]; then configuration=$argument; fi
    previous=$argument
done
folder=$(dirname "$configuration")
sed -i \
    -e "s|^\( *\)bind \*:$RAY_SERVE_HAPROXY_STATS_PORT\$|\1bind unix@$folder/stats.sock mode 600|" \
    -e "s|^\( *\)bind :$RAY_SERVE_HAPROXY_METRICS_PORT\$|\1bind unix@$folder/prom.sock mode 600|" \
    "$configuration"
exec @HAPROXY@ "$@"
