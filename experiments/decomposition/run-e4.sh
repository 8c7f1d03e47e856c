#!/bin/sh
# Runs E4 into a folder: cuts and tokenises the books, pre-trains, scores, fine-tunes. The same command goes on after any
# end. BOOKS is a folder with manifest.json and the packed books, as for benchmarks/books_perplexity.py.
#
#     experiments/decomposition/run-e4.sh BOOKS OUT
set -eu
here=$(cd "$(dirname "$0")" && pwd)
books=$(cd "${1:?"usage: run-e4.sh BOOKS OUT"}" && pwd)
out=${2:?"usage: run-e4.sh BOOKS OUT"}
mkdir -p "$out"
cd "$out"
if [ ! -f tokens/manifest.json ]; then
    python - "$here/../../benchmarks" "$books" <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from books_perplexity import cut_bodies

cut_bodies(Path(sys.argv[2]), Path(), test_books=1_000)  # all that there are
PYTHON
    metatokens prepare train --out tokens --vocab-size 4096
fi
metatokens sweep "$here/e4.yaml" --out e4 --jobs "${JOBS:-2}"
metatokens sweep "$here/e4-recall.yaml" --out e4-recall --jobs "${JOBS:-2}"
