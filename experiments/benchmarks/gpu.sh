#!/usr/bin/env bash
# What pruning costs and gains on one GPU: writes results/gpu.md in at most 8 minutes, installing aside.
#
#   bash experiments/benchmarks/gpu.sh                   # makes .venv-gpu with JAX for the driver's CUDA
#   PYTHON=python3 bash experiments/benchmarks/gpu.sh    # in an environment that has JAX for a GPU already
#   SMALL=1 PYTHON=.venv/bin/python bash experiments/benchmarks/gpu.sh    # small sizes, on a CPU as well
#
# Further flags are those of `python -m experiments.benchmarks.gpu`.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${PYTHON:-}" ]; then
    # CUDA 13 needs a driver of 580 or newer.
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | cut -d. -f1)
    cuda=$([ "$driver" -ge 580 ] && echo 13 || echo 12)
    python3 -m venv .venv-gpu
    .venv-gpu/bin/pip install -q -c constraints.txt -e '.[experiments]' "jax[cuda$cuda]"
    PYTHON=.venv-gpu/bin/python
fi

flags=(--seconds 460)
if [ -n "${SMALL:-}" ]; then
    flags+=(--small)
else
    "$PYTHON" -c 'import jax, sys; sys.exit(0 if jax.default_backend() == "gpu" else "JAX finds no GPU here.")'
fi
exec "$PYTHON" -m experiments.benchmarks.gpu "${flags[@]}" "$@"
