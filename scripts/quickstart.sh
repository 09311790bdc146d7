#!/usr/bin/env bash
# Learn the demo concept with ICO and generate it in new places with DCI, on the embedded model.
# From a fresh clone: bash scripts/quickstart.sh        (two to four minutes on two cores, after installation)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh train

run=outputs/quickstart-$(date +%Y-%m-%dT%H-%M-%S)
echo "== 1/2 Learning the concept in data/concepts/cottage with ICO"
python scripts/train_ico.py --config configs/train/ico-tiny.yaml --name cottage --logdir "$run/logs" \
    data.images=data/concepts/cottage concept.class_noun=house
concept=$(ls -d "$run"/logs/*_cottage)/concept.safetensors

echo "== 2/2 Generating it in places that its images do not show, with DCI"
for place in "on the beach" "in the desert" "in the forest" "in space"; do
    echo "   a V* house $place"
    python scripts/sample_dci.py --concept "$concept" --prompt "a V* house $place" --n-samples 4 --outdir "$run/images"
done
python scripts/contact_sheet.py "$run/images/samples" --columns 4 --scale 3 --out "$run/grid.png"

echo
echo "Done. Its reference images: data/concepts/cottage"
echo "The new images: $run/images/samples, together in $run/grid.png (a row for each place)"
