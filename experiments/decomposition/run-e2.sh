#!/bin/sh
# Runs E2 into a folder: trains, scales the windows, asks without and with training at the new length. The same command
# goes on after any end.
#
#     experiments/decomposition/run-e2.sh OUT
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?"usage: run-e2.sh OUT"}
mkdir -p "$out"
cd "$out"
metatokens sweep "$here/e2-trained.yaml" --out trained --jobs "${JOBS:-2}"
for factor in 4 8; do
    for arm in mark pause meta; do
        for seed in 0 1 2 3 4; do
            scaled=x$factor/$arm/seed-$seed
            [ -d "$scaled" ] ||
                metatokens extend "trained/runs/list_recall/$arm/seed-$seed" --factor $factor --no-training --out "$scaled"
        done
        task='{kind: list_recall, num_lists: [1, 200]}'
        [ $arm != mark ] || task='{kind: list_recall, num_lists: [1, 200], marks: true, meta_places: {kind: none}}'
        [ -f "zero-shot-x$factor-$arm.json" ] ||
            metatokens evaluate x$factor/$arm/seed-* --task "$task" --size "[2, 4]" --instances 200 --extrapolate true \
                --lengths "[33-64, 65-128, 129-256, 257-512]" --json >partial.json
        [ -f "zero-shot-x$factor-$arm.json" ] || mv partial.json "zero-shot-x$factor-$arm.json"
    done
done
metatokens sweep "$here/e2-extended.yaml" --out extended --jobs "${JOBS:-2}"
