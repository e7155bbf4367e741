# Drains an Envoy before it is stopped: moves its callers to other Envoys and waits for the requests in flight.
#
#   bash drain.sh ADMIN AWAY_S MOST_S
#
# ADMIN is the address of the admin interface, host:port.
#
# From now on /health fails, and every response asks its caller to reconnect. For AWAY_S seconds the script waits for
# load balancers to see that. Then it waits until no request is in flight and no byte is unsent, for at most MOST_S
# seconds. The SIGTERM after this script ends Envoy at once.
set -eu
host=${1%:*} port=${1##*:} away_s=$2 most_s=$3

admin() {
    exec 3<>"/dev/tcp/$host/$port"
    printf '%s HTTP/1.1\r\nhost: admin\r\nconnection: close\r\ncontent-length: 0\r\n\r\n' "$1" >&3
    cat <&3
    exec 3>&-
}

# Matches connections of the listeners (8080 and 8443) with unsent bytes, which the kernel drops when the pod exits.
unsent=':(1F90|20FB) [0-9A-F]+:[0-9A-F]{4} [0-9A-F]{2} 0*[1-9A-F][0-9A-F]*:'

admin 'POST /healthcheck/fail' >/dev/null || true
sleep "$away_s"
for ((second = 0; second < most_s; second++)); do
    stats=$(admin 'GET /stats?filter=^http\.edge\.downstream_(rq_active|cx_tx_bytes_buffered)$') || break
    if [[ $stats == *downstream_rq_active:* && ! $stats =~ :\ [1-9] ]]; then
        [[ $(cat /proc/net/tcp /proc/net/tcp6) =~ $unsent ]] || break
    fi
    sleep 1
done
