#!/bin/sh
# Runs E1 into a folder, task by task and there seed by seed over all arms. The same command goes on after any end.
#
#     experiments/decomposition/run.sh OUT
#
# JOBS is the number of trainings at a time, by default 2; keep it, since threads change the last bits of sums.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?"usage: run.sh OUT"}
(cd "$here" && sha256sum --check --quiet frozen.sha256)
for task in parity copying list_recall; do
    # 1: some trainings failed, which must not keep the others from running
    metatokens sweep "$here/$task.yaml" --out "$out/$task" --jobs "${JOBS:-2}" || {
        code=$?
        [ $code -eq 1 ] || exit $code
    }
done
