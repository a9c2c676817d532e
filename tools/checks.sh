#!/usr/bin/env bash
# What the registry and comfy-test check in a pack. Left out where the tools cannot be installed
# within two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! [ -x .venv-checks/bin/comfy-test ]; then
  python3 -m venv .venv-checks
  if ! timeout 120 .venv-checks/bin/pip install -q comfy-cli comfy-test; then
    rm -rf .venv-checks
    echo "tools/checks.sh: comfy-cli and comfy-test cannot be installed, nothing is checked"
    exit 0
  fi
fi
.venv-checks/bin/comfy-test lint --check javascript --strict .
# A finding does not change the exit status; what is printed tells, where it fails as well.
found=$(.venv-checks/bin/comfy --skip-prompt node validate 2>&1) || true
grep -q "All validation checks passed" <<<"$found" || {
  echo "$found"
  exit 1
}
