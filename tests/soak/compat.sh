#!/usr/bin/env bash
# Runs the tests with other versions than those of constraints.txt, in a virtual environment of its own.
#
#   bash tests/soak/compat.sh lowest           jax, numpy, optax and flax at the lower bounds of pyproject.toml
#   bash tests/soak/compat.sh newest           the newest of everything that pip finds
#   bash tests/soak/compat.sh newest -k masks  further arguments go to pytest
#
# PYTHON says with which interpreter (default: python3; the lowest supported is 3.11), VENV where the
# environment is kept (default: a new folder, removed at the end).
set -euo pipefail
cd "$(dirname "$0")/../.."

which=${1:-}
[ "$which" = lowest ] || [ "$which" = newest ] || {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
shift

if [ -z "${VENV:-}" ]; then
  VENV=$(mktemp -d)
  trap 'rm -rf "$VENV"' EXIT
fi
"${PYTHON:-python3}" -m venv "$VENV"
python=$VENV/bin/python

pins=()
if [ "$which" = lowest ]; then
  # `name>=1.2` becomes `name==1.2`, for what jaxprune itself and its use with flax depend on.
  mapfile -t pins < <("$python" - <<'PY'
import re
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + project["optional-dependencies"]["experiments"]
for requirement in needed:
    if re.match(r"(jax|numpy|optax|flax)>=", requirement):
        print(requirement.replace(">=", "=="))
PY
)
fi
echo "${pins[@]:-the newest versions}"
"$python" -m pip install -q -e '.[test]' "${pins[@]}"
"$python" -c 'import flax, jax, numpy, optax, sys
print(f"Python {sys.version.split()[0]}:", *(f"{m.__name__} {m.__version__}" for m in (jax, numpy, optax, flax)))'
"$python" -m pytest -q -p no:cacheprovider -n auto "$@"
