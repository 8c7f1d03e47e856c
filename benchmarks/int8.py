"""Does decoding gain from weights of 8 bits? Float32 weights and weights that torchao has quantised take turns.

    pip install torchao
    python benchmarks/int8.py --out benchmarks/results/int8.json

GPT-2's size with meta-attention and random weights; both continue the same prompt by the steps of `generate_text`.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from metatokens.bench.generation import REST, contend
from metatokens.bench.generation_contenders import GENERATION, make_prompts
from metatokens.bench.machine import describe_machine
from metatokens.bench.turns import ratio, spread, take_turns
from metatokens.config.bench import GenerationBench


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    settings = GenerationBench(prompt=128, new=32)
    prompts = make_prompts(settings)
    machine = describe_machine("cpu")
    plain = GENERATION["meta_steps"](settings, prompts)
    quantised = GENERATION["meta_steps"](settings, prompts)
    quantize_(quantised.model, Int8WeightOnlyConfig())
    found = take_turns(
        {"float32": contend(plain, prompts).turn, "int8": contend(quantised, prompts).turn}, rounds=options.rounds
    )
    with torch.no_grad():
        ids = torch.tensor([prompts.rows[0]])
        difference = float((plain.model(ids).logits - quantised.model(ids).logits).abs().max())
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine | {"torchao": version("torchao")},
        "int8 over float32": vars(ratio(found["int8"][REST], found["float32"][REST])),
        "seconds": {name: spread(parts[REST]).median for name, parts in found.items()},
        "largest difference of logits": difference,
        "rounds": found,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
