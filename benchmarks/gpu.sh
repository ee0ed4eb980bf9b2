#!/usr/bin/env bash
# Tests and benchmarks on a machine with an NVIDIA GPU that nothing can be installed on but what is carried there.
#
#   bash benchmarks/gpu.sh pack      here: what such a machine lacks into .gpu/ (under 64 MiB, never committed)
#   bash benchmarks/gpu.sh tests     there, in the root of the repository, with .gpu/ beside it; results in $OUT
#   bash benchmarks/gpu.sh scoring
#   WAIT=560 bash benchmarks/gpu.sh evidence run --tasks mrpc     as benchmarks/evidence.py, a process a core; what is
#     there after so many seconds comes back, and the same command again waits on
#
# .gpu holds MiniLM in float16 (the weights are cast back when they are loaded), other models and data of ../shared,
# and wheels of the packages that were not there.
set -euo pipefail
cd "$(dirname "$0")/.."
PACK=.gpu
WHEELS="datasets dill multiprocess nltk opacus shtab"
DATA="trec sst2 mrpc cola stsb g2p_en_gb"

pack() {
  rm -rf $PACK && mkdir -p $PACK/models/minilm $PACK/wheels
  cp -rL ../shared/models/{misaki_bart_us,stories260K} $PACK/models/
  tar czf $PACK/data.tgz -C ../shared/data $DATA
  local python=${PYTHON:-.venv/bin/python}
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d $PACK/wheels $WHEELS
  "$python" -m pip wheel -q --no-deps -w $PACK/wheels rouge-score  # which comes as source
  "$python" - <<'PY'
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tsqlora.packaged import encoder_folder

found, target = encoder_folder(), Path(".gpu/models/minilm")
for file in found.glob("*"):
    if file.suffix in (".json", ".txt") and file.name != "data_config.json":
        shutil.copy(file, target)
halved = {n: t.half() if t.is_floating_point() else t for n, t in load_file(found / "model.safetensors").items()}
save_file(halved, target / "model.safetensors", {"format": "pt"})
PY
  du -sh $PACK
}

unpack() {
  OUT=${OUT:-runs/gpu}
  mkdir -p "$OUT"
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
  export PYTHONPATH="$PWD/src:/tmp/site"
  if [ ! -d ../shared ]; then
    mkdir -p ../shared/data && tar xzf $PACK/data.tgz -C ../shared/data && cp -r $PACK/models ../shared/
  fi
  [ -d /tmp/site ] || python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site $PACK/wheels/*.whl || true
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  python3 -c "import torch, transformers as t, peft; print(torch.__version__, t.__version__, peft.__version__)"
  python3 -c "import torch; assert torch.cuda.is_available(), 'no GPU'"
}

# Without vl-convert the report's tests fail; test_layout reads the metadata of an installed package.
tests() {
  timeout 300 python3 -m pytest -q -n 8 -p no:cacheprovider tests/test_per_sample_grads.py tests/test_layer_kinds.py \
    tests/test_lookahead.py tests/test_scoring.py tests/test_dynamic_rank.py tests/test_online.py tests/test_fitting.py \
    tests/test_pipeline.py tests/test_adapter.py 2>&1 | tee "$OUT/tests.log" | tail -30 || true
}

scoring() {
  timeout 180 python3 benchmarks/scoring.py --shared ../shared --batch-size 256 --llama 2048 16 256 16 \
    --out "$OUT/scoring.json" 2>&1 | tee "$OUT/scoring.log" || true
  timeout 120 python3 benchmarks/scoring.py --shared ../shared --bf16 --batch-size 256 --llama 2048 16 256 16 \
    --out "$OUT/scoring_bf16.json" 2>&1 | tee "$OUT/scoring_bf16.log" || true
}

# Small models leave a GPU idle; the multi-process service lets the processes' kernels run side by side (2.5 times as fast).
# It runs in a session of its own, so that a second call, where the machine is kept between them, finds it still at work.
evidence() {
  local there=/tmp/evidence until=$((SECONDS + ${WAIT:-560}))
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log
  if [ ! -d $there ]; then
    mkdir -p $there /tmp/mps /tmp/mps-log && nvidia-cuda-mps-control -d || true
    cp benchmarks/results/evidence*.jsonl $there/
    setsid nohup python3 benchmarks/evidence.py "$@" --processes "$(nproc)" --results $there > $there/log 2>&1 &
    sleep 5
  fi
  while [ $SECONDS -lt $until ] && pgrep -f evidence.py > /dev/null; do sleep 5; done
  nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv
  cp $there/* "$OUT/" && tail -n 40 $there/log
}

case "${1:-}" in
pack) pack ;;
tests | scoring | evidence) unpack && "$@" ;;
*) sed -n 2,11p "$0" && exit 2 ;;
esac
