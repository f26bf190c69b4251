#!/usr/bin/env bash
#SBATCH --job-name=allo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
# A Ray cluster over the nodes of one Slurm allocation, and one allo command on it:
#   sbatch cluster/slurm.sh align --config /shared/configs/run.yaml
# Repository, .venv, store and runs lie on a file system that all nodes mount. Requeued after a time limit or a
# lost node, the run goes on from its store.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the repository}"
[ $# -gt 0 ] || { echo "say what to run: sbatch $0 align --config ..." >&2; exit 2; }
export PATH=$PWD/.venv/bin:$PATH
command -v ray >/dev/null || { echo "found no ray in $PWD/.venv: run ./setup.sh gpu first" >&2; exit 1; }

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --overlap --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
# Several jobs of one machine must not meet on a port.
port=$((20000 + SLURM_JOB_ID % 20000))
address=$head_ip:$port

# Other users are on this network: without the token nobody else can run code here.
umask 077
mkdir -p "$HOME/.ray"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/slurm-$SLURM_JOB_ID.token
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; kill $(jobs -p) 2>/dev/null || true' EXIT
export RAY_USAGE_STATS_ENABLED=0
ulimit -n "$(ulimit -Hn)"

cpus=${SLURM_CPUS_PER_TASK:-$(nproc)} gpus=${SLURM_GPUS_ON_NODE:-0}
# Local disk for sockets and spilled objects: a shared file system bears neither. Short: socket paths are limited.
tmp=/tmp/ray-$SLURM_JOB_ID

srun --overlap --nodes=1 --ntasks=1 -w "$head" \
    ray start --block --head --node-ip-address "$head_ip" --port "$port" --dashboard-port $((port + 20000)) \
    --temp-dir "$tmp" --num-cpus "$cpus" --num-gpus "$gpus" &
for _ in $(seq 60); do
    RAY_ADDRESS=$address ray status >/dev/null 2>&1 && break
    sleep 2
done
if [ ${#nodes[@]} -gt 1 ]; then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 -w "$others" \
        ray start --block --address "$address" --num-cpus "$cpus" --num-gpus "$gpus" &
fi
for _ in $(seq 60); do
    joined=$(RAY_ADDRESS=$address ray status 2>/dev/null | sed -n '/^Active:/,/^Pending:/p' | grep -c '^ 1 ' || true)
    [ "$joined" -eq "${#nodes[@]}" ] && break
    sleep 2
done
[ "$joined" -eq "${#nodes[@]}" ] || { echo "only $joined of ${#nodes[@]} nodes joined $address" >&2; exit 1; }

# In the background, so that Slurm's TERM reaches this script and is handed on while there is time left.
RAY_ADDRESS=$address allo "$@" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null || true' TERM
while kill -0 "$run" 2>/dev/null; do wait "$run" && code=0 || code=$?; done
exit "${code:-0}"
