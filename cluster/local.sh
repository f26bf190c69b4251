#!/usr/bin/env bash
# A real multi-node Ray cluster on one machine: a raylet, an object store and ports of its own for each node,
# token authentication. For trying out what crosses nodes before paying for machines.
#
#   cluster/local.sh start [N]              a head and N more nodes, node1 .. nodeN (default 2)
#   cluster/local.sh add NAME [FLAGS]       one more node; FLAGS go to `ray start` (--num-cpus 4 --resources ...)
#   cluster/local.sh kill NAME              ends a node as a power cut would: SIGKILL to all its processes
#   cluster/local.sh status                 nodes and resources
#   cluster/local.sh stop                   ends every node
#   eval "$(cluster/local.sh env)"          lets this shell join the cluster and submit jobs to it
#
# ALLO_CLUSTER_DIR (default /tmp/allo-cluster-UID) holds pid files, logs and the token; two folders, two clusters.
# Keep its path short: Ray puts sockets below it, whose paths have at most 107 characters.
set -euo pipefail

dir=${ALLO_CLUSTER_DIR:-/tmp/allo-cluster-$(id -u)}
bin=${ALLO_BIN:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin}
[ -x "$bin/ray" ] || bin=$(dirname "$(command -v ray || echo /nowhere/ray)")
[ -x "$bin/ray" ] || { echo "found no ray: run ./setup.sh first, or set ALLO_BIN to the folder that holds it" >&2; exit 1; }

# Jobs run `python`: it has to be the one that Ray runs in.
export PATH=$bin:$PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token
# A killed node is noticed after about 5 seconds instead of 30; one that is only slow has 20.
export RAY_health_check_initial_delay_ms=2000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=4
export RAY_USAGE_STATS_ENABLED=0

fail() { printf '%s\n' "$*" >&2; exit 1; }
free_port() { "$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# launch NAME FLAGS...: `ray start --block` in a session of its own; its pid and start time go to NAME.pid.
launch() {
    local name=$1 log=$dir/$1.log
    shift
    # Ray gives up after 30 seconds, which a busy machine may need: so three times.
    for _ in 1 2 3; do
        rm -f "$log"
        # A folder of its own: each node unpacks a job's package into it, and throws away what lies there before.
        # Ports of their own: nodes of one machine must share neither Ray's range of worker ports nor the agent's 52365
        # (a head whose agent could not have it answers job submissions with "No available agent").
        setsid "$bin/ray" start --block --temp-dir "$dir/$name" --min-worker-port 0 --max-worker-port 0 \
            --dashboard-agent-listen-port "$(free_port)" --object-store-memory "${ALLO_STORE_BYTES:-268435456}" "$@" >"$log" 2>&1 </dev/null &
        "$bin/python" - "$!" "$dir/$name.pid" <<'EOF'
import sys, psutil
process = psutil.Process(int(sys.argv[1]))
open(sys.argv[2], "w").write(f"{process.pid} {process.create_time()}\n")
EOF
        # Ray says so once the node is connected; an early end means a flag or a port was wrong.
        for _ in $(seq 300); do
            grep -qs 'Ray runtime started' "$log" && return
            alive "$name" || break
            sleep 0.2
        done
        grep -qs 'timed out during startup' "$log" || break
    done
    alive "$name" && fail "$name did not start within a minute: see $log"
    fail "$name did not start: $(tail -n 3 "$log")"
}

# Whether NAME runs: the process of its pid file, and not a later one with the same number.
alive() { signal "$1" 0 2>/dev/null; }

# signal NAME NUMBER: to the node's process and all below it; with 0 only asks whether it runs.
signal() {
    [ -f "$dir/$1.pid" ] || return 1
    "$bin/python" - "$2" $(cat "$dir/$1.pid") <<'EOF'
import sys, psutil
number, pid, created = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
try:
    process = psutil.Process(pid)
    if process.create_time() != created or process.status() == psutil.STATUS_ZOMBIE:
        sys.exit(1)
    family = [process, *process.children(recursive=True)]
except psutil.NoSuchProcess:
    sys.exit(1)
for member in family:
    if number:
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            pass
if number:
    _, left = psutil.wait_procs(family, timeout=10)
    for member in left:
        member.kill()
EOF
}

# settle COUNT: waits until the head counts that many living nodes.
settle() {
    for _ in $(seq 30); do
        count=$(RAY_ADDRESS=$(address) "$bin/ray" status 2>/dev/null | sed -n '/^Active:/,/^Pending:/p' | grep -c '^ 1 ' || true)
        [ "$count" -eq "$1" ] && return
        sleep 1
    done
    fail "the head counts $count nodes instead of $1: see the logs in $dir"
}

nodes() { for file in "$dir"/*.pid; do [ -e "$file" ] && basename "$file" .pid; done; }
address() { cat "$dir/address" 2>/dev/null || fail "no cluster in $dir: start one with $0 start"; }

case "${1:-}" in
start)
    for name in $(nodes); do alive "$name" && fail "a cluster runs in $dir already: $0 stop ends it"; done
    mkdir -p "$dir" && chmod 700 "$dir" && rm -f "$dir"/*.pid "$dir"/*.log
    (umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$dir/token")
    port=$(free_port) dashboard=$(free_port)
    echo "127.0.0.1:$port" >"$dir/address"
    echo "http://127.0.0.1:$dashboard" >"$dir/dashboard"
    launch head --head --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
        --num-cpus "${ALLO_HEAD_CPUS:-2}"
    for ((i = 1; i <= ${2:-2}; i++)); do
        # One after the other: nodes of one address that start together steal each other's ports.
        launch "node$i" --address "$(address)" --num-cpus "${ALLO_NODE_CPUS:-2}"
    done
    settle $((${2:-2} + 1))
    echo "$(($(nodes | wc -l))) nodes at $(address); dashboard $(cat "$dir/dashboard")"
    ;;
add)
    name=${2:?add needs a name}
    alive "$name" && fail "$name runs already"
    launch "$name" --address "$(address)" "${@:3}"
    settle "$(nodes | wc -l)"
    echo "$name joined"
    ;;
kill)
    name=${2:?kill needs a name: $(nodes | tr '\n' ' ')}
    signal "$name" 9 || fail "$name does not run; there are: $(nodes | tr '\n' ' ')"
    rm -f "$dir/$name.pid"
    [ "$name" = head ] || settle "$(nodes | wc -l)"
    echo "$name is gone"
    ;;
status)
    RAY_ADDRESS=$(address) "$bin/ray" status
    ;;
env)
    address >/dev/null
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_ADDRESS=%q RAY_API_SERVER_ADDRESS=%q\n' \
        "$dir/token" "$(address)" "$(cat "$dir/dashboard")"
    ;;
stop)
    # The head last: the others take leave of it.
    for name in $(nodes | grep -v '^head$' || true) head; do signal "$name" 15 || true; done
    rm -rf "$dir"
    echo "stopped"
    ;;
*)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
