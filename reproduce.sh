#!/usr/bin/env bash
# bash reproduce.sh          set up, train, evaluate, print paper against measured
# bash reproduce.sh --test   set up, then the whole test suite
#
# With Human3.6M in data/ (or in the folder that DATA names) this runs the headline rows of both papers, on one CUDA GPU
# or on a CPU. Without it, the same pipeline runs on the embedded procedural motion, in minutes on two CPU cores.
# An interrupted run goes on where it stopped when the command is given again; finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")"
DATA=${DATA:-data}

has() { "$1" -c "import ${*:2}" 2>/dev/null; }

setup() {  # sets $python to one that has what requirements.txt lists
    local want
    want=$(command -v python3 || command -v python) || { echo "error: no python3 found; install Python 3.10 or newer" >&2; exit 2; }
    if cmp -s requirements.txt .venv/installed.txt; then python=.venv/bin/python; return; fi
    echo "Setting up .venv from requirements.txt (once; some minutes)."
    if "$want" -m venv .venv && .venv/bin/python -m pip install --quiet --retries 2 --disable-pip-version-check -r requirements.txt; then
        cp requirements.txt .venv/installed.txt
        python=.venv/bin/python
    elif has "$want" "torch, numpy${1:+, $1}"; then
        echo "Could not install; using $want, which has torch and numpy."
        python=$want
    else
        echo "error: could not install requirements.txt, and $want has no torch and numpy${1:+, $1}: check the network," \
             "or install them yourself" >&2
        exit 2
    fi
}

case "${1:-}" in
    --test)
        setup "pytest, hypothesis"
        exec "$python" -m pytest "${@:2}" ;;
    "") setup "" ;;
    *) echo "error: unknown option $1; usage: bash reproduce.sh [--test]" >&2; exit 2 ;;
esac

if [ -e "$DATA/data_3d_h36m.npz" ]; then
    rows="gridconv-gt gridconv-gt-learnable glagcn-gt-243"
    echo "Human3.6M found in $DATA: training the headline rows ($rows)."
else
    rows="gridconv-synthetic gridconv-synthetic-learnable glagcn-synthetic"
    echo "No Human3.6M in $DATA: running both methods on the embedded procedural motion instead ($rows)."
fi
for row in $rows; do
    "$python" train.py "$row" --data "$DATA" --out "results/$row" > /dev/null
done
"$python" train.py report results
echo
echo "Everything is in results/report.md."
