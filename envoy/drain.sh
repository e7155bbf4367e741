# Before an Envoy is stopped: sends callers elsewhere, and waits until what is under way has been answered.
#
#   bash drain.sh ADMIN AWAY_S MOST_S
#
# ADMIN is the address of the admin interface, host:port.
#
# /health fails from here on, and every answer asks its caller to connect anew. AWAY_S seconds are for those that choose
# among Envoys to see it; after that it waits until nothing is under way, and nothing is left to send, for MOST_S seconds
# at most. SIGTERM, which follows, ends Envoy at once.
set -eu
host=${1%:*} port=${1##*:} away_s=$2 most_s=$3

admin() {
    exec 3<>"/dev/tcp/$host/$port"
    printf '%s HTTP/1.1\r\nhost: admin\r\nconnection: close\r\ncontent-length: 0\r\n\r\n' "$1" >&3
    cat <&3
    exec 3>&-
}

# Rows of the listeners, 8080 and 8443, whose peers have not had all that was sent: what the kernel still has is lost
# with the pod.
unsent=':(1F90|20FB) [0-9A-F]+:[0-9A-F]{4} [0-9A-F]{2} 0*[1-9A-F][0-9A-F]*:'

admin 'POST /healthcheck/fail' >/dev/null || true
sleep "$away_s"
for ((second = 0; second < most_s; second++)); do
    stats=$(admin 'GET /stats?filter=^(http|tcp)\.edge.*\.downstream_(rq_active|cx_tx_bytes_buffered)$') || break
    if [[ $stats == *downstream_rq_active:* && ! $stats =~ :\ [1-9] ]]; then
        [[ $(cat /proc/net/tcp /proc/net/tcp6) =~ $unsent ]] || break
    fi
    sleep 1
done
