#!/usr/bin/env bash
# All GPU measurements, in under 8 minutes; the output is kept in benchmarks/logs/gpu.log. Options: see gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmarks/logs
{
    date --utc +%F
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no nvidia-smi"
    git log -1 --format='commit %h' || true
    time python benchmarks/gpu.py "$@"
} 2>&1 | tee benchmarks/logs/gpu.log
