#!/usr/bin/env bash
# The fast tests with the lowest versions that requirements.txt allows, then with the newest: bash benchmarks/versions.sh
# Needs uv (pip install uv) and room for two torches with CUDA, 12 GB; prints the versions and pytest's summary for each.
set -euo pipefail
cd "$(dirname "$0")/.."
names=$(sed -nE 's/^([a-z]+).*/\1/p' requirements.txt | paste -sd '|')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for resolution in lowest-direct highest; do
  uv venv -q --python 3.11 "$folder/$resolution"
  uv pip install -q --python "$folder/$resolution" --resolution "$resolution" -r requirements.txt
  uv pip install -q --python "$folder/$resolution" -r requirements-dev.txt
  echo "== $resolution"
  uv pip list --python "$folder/$resolution" | grep -E "^($names) "
  "$folder/$resolution/bin/python" -m pytest -q | tail -n 3 || true
done
