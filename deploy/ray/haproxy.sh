#!/bin/sh
# ray.env names it to Serve: Serve's HAProxy, but its own errors have the contract's form, its statistics and metrics are
# for this machine only, and it waits for a body that comes in packets of its own: only a whole request can be retried.
for config; do case $config in *.cfg) break ;; esac; done
ours='content-type application/json hdr X-Request-ID %[var(txn.id)]'
sed -i "$config" \
    -e '/^frontend http_frontend/a\    http-request set-header X-Request-ID %[uuid] unless { req.hdr(X-Request-ID) -m reg ^[\\w.-]{1,128}$ }\n    http-request set-var(txn.id) req.hdr(X-Request-ID)\n    http-request wait-for-body time 10s if { req.hdr_val(content-length) 1:65536 }' \
    -e "/^frontend http_frontend/a\\    http-error status 408 $ours string '{\"error\": \"the body did not arrive in time; send it faster\"}'" \
    -e "s|errorfile 502 .*|http-error status 502 $ours hdr Retry-After 1 string '{\"error\": \"the server that had this request is gone; retry after the time in Retry-After\"}'|" \
    -e "s|errorfile 503 .*|http-error status 503 $ours hdr Retry-After 1 string '{\"error\": \"no replica is ready; retry after the time in Retry-After\"}'|" \
    -e "s|errorfile 504 .*|http-error status 504 $ours string '{\"error\": \"no replica has answered in time; allow more time\"}'|" \
    -e "s|return status 404 .*|return status 404 $ours string '{\"error\": \"no model is at this path\"}'|" \
    -e '/^frontend prometheus/,/mode/s|bind :|bind 127.0.0.1:|' \
    -e '/^listen stats/,$s|bind [*]:|bind 127.0.0.1:|'
exec "$HAPROXY" "$@"
