#!/usr/bin/env bash
# The main job on a synthetic cohort: prepare -> joint pre-training -> checkpoint -> phenotype regression -> report.
# Everything lands under demo/; 5 to 20 minutes on 2 CPU cores, with the install. To resume it, run it again.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
source launch/env.sh
mmcl=.venv/bin/mmcl
[ -f demo/cohort/cohort.json ] || $mmcl prepare synthetic --subjects=1600 --seed=0 --out=demo/cohort
$mmcl train --config=joint:demo --workdir=demo/joint --config.data.cohort=demo/cohort
$mmcl evaluate --workdir=demo/joint
printf '\nmade:\n  %s\n  %s\n  %s\n  %s\n' \
  "demo/cohort                        the cohort" \
  "demo/joint/checkpoints             the checkpoints" \
  "demo/joint/evaluation/*/report.html  the report with its figures" \
  "demo/joint/tensorboard             training curves for TensorBoard"
