#!/usr/bin/env bash
# Everything that an accelerator must show, in at most eight minutes from a bare machine that has no network.
#
#   tests/benchmarks/on_device.sh --pack       # where there is a network: fills .on_device/ (carry it along)
#   tests/benchmarks/on_device.sh [--out DIR]  # on the device: writes DIR/on_device.json and DIR/on_device.md
#
# The device's machine needs Python 3.10 or newer with torch. Other packages are those of that Python, or come from
# .on_device/. LIB_REFERENCE_DIR names the folder of published results and LIB_WEIGHTS_DIR that of a pretrained language
# model; .on_device/reference and .on_device/weights are used if they are not set. PYTHON names the interpreter.
# Other arguments go to on_device.py (--device cpu, --minutes 4). On a machine without an accelerator models are small.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
kept=.on_device
# What `import lib_lightning` and its recipes need beside torch, numpy, safetensors and transformers. Compiled ones are
# packed for the interpreter that TARGET_PYTHON names (3.12), on Linux with x86-64.
pure=(torchmetrics lightning lightning-utilities texttable jsonargparse tqdm networkx)
compiled=(igraph scipy)

if [ "${1:-}" = --pack ]; then
    mkdir -p "$kept/wheels"
    common=(--quiet --no-deps --only-binary=:all: -d "$kept/wheels" -c constraints.txt)
    "$python" -m pip download "${common[@]}" "${pure[@]}"
    "$python" -m pip download "${common[@]}" --python-version "${TARGET_PYTHON:-3.12}" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "${compiled[@]}"
    if [ -n "${LIB_REFERENCE_DIR:-}" ]; then mkdir -p "$kept/reference" && cp "$LIB_REFERENCE_DIR"/* "$kept/reference"; fi
    if [ -n "${LIB_WEIGHTS_DIR:-}" ]; then mkdir -p "$kept/weights" && cp "$LIB_WEIGHTS_DIR"/* "$kept/weights"; fi
    du -sh "$kept"
    exit
fi

# Only packages that are missing are taken from the wheels, one by one, so that the others stay as they are.
missing=()
for name in "${pure[@]}" "${compiled[@]}"; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('${name//-/_}') is None)" || missing+=("$name")
done
if [ "${#missing[@]}" -gt 0 ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$kept/wheels" --target "$site" \
        "${missing[@]}" || { echo "Missing: ${missing[*]}. Run $0 --pack where there is a network." >&2; exit 1; }
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

arguments=()
reference="${LIB_REFERENCE_DIR:-$kept/reference}"
weights="${LIB_WEIGHTS_DIR:-$kept/weights}"
[ -d "$reference" ] && arguments+=(--reference "$reference")
[ -d "$weights" ] && arguments+=(--weights "$weights")
# The limit is for the whole, imports and a step that cannot be interrupted included.
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" timeout 480 "$python" -m tests.benchmarks.on_device "${arguments[@]}" "$@"
