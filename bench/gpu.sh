#!/usr/bin/env bash
# Measures everything that bench/gpu.py measures, unattended: finds a Python with a torch that sees a CUDA device, adds the
# packages that are missing if they can be had, and runs all steps. Arguments go to bench/gpu.py (--commit).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sees_cuda() { "$1" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; }

found=""
for python in ${PYTHON:-} .venv/bin/python python3 python /opt/conda/bin/python /usr/bin/python3; do
	command -v "$python" >/dev/null 2>&1 && sees_cuda "$python" && { found=$python; break; }
done
if [ -z "$found" ]; then
	echo "skipped everything: no Python here has a torch that sees a CUDA device"
	exit 0
fi
echo "using $found, torch $("$found" -c 'import torch; print(torch.__version__)')"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

missing=$("$found" - <<'PY'
import importlib.util
names = {"numpy": "numpy", "pydantic": "pydantic", "yaml": "pyyaml", "safetensors": "safetensors", "tiktoken": "tiktoken",
         "tokenizers": "tokenizers", "gguf": "gguf", "jinja2": "jinja2", "psutil": "psutil", "llguidance": "llguidance",
         "zstandard": "zstandard", "rich": "rich", "typer": "typer", "huggingface_hub": "huggingface_hub",
         "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"}
print(" ".join(package for module, package in names.items() if importlib.util.find_spec(module) is None))
PY
)
if [ -n "$missing" ]; then
	echo "missing packages: $missing"
	# WHEELS names a folder of wheels for a machine without a network.
	timeout 60 "$found" -m pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"} $missing ||
		echo "could not install them: steps that need them will fail and say so"
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "$found" bench/gpu.py "$@"
