"""A checkpoint brings its own code: it gives the same bits in a process for which the package is not installed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from grafted_models import CONFIG, ids, make, trained
from metatokens import MetaTokenForTokenClassification
from metatokens.graft import save_graft
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_model
from metatokens.model.schedule import UniformSchedule, state_schedule
from tiny_models import MAX_LENGTH, META, PAD, randomize, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.slow
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_LENGTH // 4,
}

# a fork for each program, of one process that has imported what takes seconds and has no part in it
FORKS = """
import json, os, signal, sys, traceback
sys.modules["metatokens"] = None  # as far as this process can tell
import torch
from transformers import GenerationMixin, PreTrainedModel

for line in sys.stdin:
    program, folder, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.chdir(folder)
        sys.argv[1:] = arguments
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Run(Protocol):
    def __call__(self, program: str, *arguments: Path, folder: Path) -> None: ...


@pytest.fixture(scope="module", name="run")
def fixture_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a program, which must end well, in a folder, where the package cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # code of checkpoints is copied there
    environment["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as process:

        def run(program: str, *arguments: Path, folder: Path) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps([program, str(folder), *map(str, arguments)]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "0\n", "see the captured standard error"

        yield run


MODELS = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ids = torch.load(sys.argv[1])
for number, path in enumerate(sys.argv[2:]):
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    causal = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    decoder = AutoModel.from_pretrained(path, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config).__module__
    with torch.no_grad():
        generated = causal.generate(ids[:1], max_new_tokens=4, do_sample=False)
        outputs = causal(ids).logits, decoder(ids).last_hidden_state, generated
        causal.save_pretrained(f"again{number}")
        again = AutoModelForCausalLM.from_pretrained(f"again{number}", trust_remote_code=True)
        assert type(again) is not type(causal)  # from the code that was saved, not from the code that saved it
        assert torch.equal(again(ids).logits, outputs[0])
    torch.save(outputs, f"{path}.pt")
"""


@torch.no_grad()
def test_models_from_remote_code_give_the_same_bits(run: Run, tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "yarn": {"rope_parameters": YARN, "position_layers": [1]},
        "random_positions": {"position_encoding": "learned", "position_range": 150},
        "memory": {"memory": {"anchors": "meta", "window": 2, "num_sinks": 1}},
        "cross": {"meta_attention_over": "cross"},
    }
    models = {variant: tiny_model(**fields, dtype=torch.float32) for variant, fields in variants.items()}
    ids = tokens("x_xx_x__xxxxx", "xxxxxxx_xxxx_")
    for variant, model in models.items():
        save_model(model, tmp_path / "first" / variant)
        # what transformers itself saves of a loaded model is no worse
        MetaTokenForCausalLM.from_pretrained(tmp_path / "first" / variant).save_pretrained(tmp_path / variant)
    torch.save(ids, tmp_path / "ids.pt")
    run(MODELS, tmp_path / "ids.pt", *(tmp_path / variant for variant in models), folder=tmp_path)
    for variant, model in models.items():
        logits, hidden, generated = torch.load(tmp_path / f"{variant}.pt")
        assert torch.equal(logits, model(ids).logits)
        assert torch.equal(hidden, model.model(ids).last_hidden_state)
        assert torch.equal(generated, model.generate(ids[:1], max_new_tokens=4, do_sample=False))


HEAD = """
import sys, torch
from transformers import AutoModelForTokenClassification, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

path, ids = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForTokenClassification.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert type(model.model).__module__.startswith("transformers_modules."), type(model.model).__module__
assert "MetaTokenForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
"""


@torch.no_grad()
def test_a_head_from_remote_code_gives_the_same_bits(run: Run, tmp_path: Path) -> None:
    model = randomize(MetaTokenForTokenClassification(tiny_config(num_labels=3))).eval()
    ids = tokens("x_xx_xx", "xx_xx..", "..x_xx_")
    save_model(model, tmp_path / "head")
    torch.save(ids, tmp_path / "ids.pt")
    paths = [tmp_path / name for name in ("head", "ids.pt", "logits.pt")]
    run(HEAD, *paths, folder=tmp_path)
    assert torch.equal(torch.load(paths[-1]), model(ids).logits)


SCHEDULE = """
import sys, torch
from transformers import AutoModelForCausalLM

path, ids = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert "custom_generate" in str(model.generate.func.__module__), model.generate
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
outputs = [one.generate(ids, max_new_tokens=12, do_sample=False) for one in (model, again)]
outputs.append(type(model).generate(model, ids, max_new_tokens=12, do_sample=False))  # the class without the partial
torch.save(outputs, sys.argv[3])
"""


def test_remote_code_follows_the_schedule_of_its_checkpoint(run: Run, tmp_path: Path) -> None:
    model = tiny_model(eos_token_id=None, dtype=torch.float32)
    state_schedule(model.generation_config, UniformSchedule(0.3))
    save_model(model, tmp_path / "scheduled")
    ids = tokens("xxxxxxx")
    torch.save(ids, tmp_path / "ids.pt")
    paths = [tmp_path / name for name in ("scheduled", "ids.pt", "out.pt")]
    run(SCHEDULE, *paths, folder=tmp_path)
    expected = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=12, do_sample=False)
    assert (expected[0, ids.shape[1] :] == META).any()
    assert all(torch.equal(output, expected) for output in torch.load(paths[-1]))


GRAFT = """
import os, sys, torch
from transformers import AutoModelForCausalLM

sys.modules["pydantic"] = None  # transformers does not bring it
ids, outputs = torch.load(sys.argv[1]), []
hub = {"cache_dir": "hub", "revision": "main", "local_files_only": True}
for path, options in ((sys.argv[2], {}), (sys.argv[3], {}), ("owner/name", hub)):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama", type(model)
    assert type(model.metatokens_graft).__module__.startswith("transformers_modules."), type(model.metatokens_graft)
    plain = AutoModelForCausalLM.from_pretrained(path, **options)
    assert not hasattr(plain, "metatokens_graft")
    with torch.no_grad():
        generated = model.generate(ids[:, :40], max_new_tokens=30, do_sample=False, eos_token_id=None)
        outputs.append((model(ids).logits, generated, plain(ids).logits))
    try:
        model.save_pretrained("again")
    except ValueError as error:
        assert "expected save_graft of the package metatokens" in str(error), error
    assert not os.path.exists("again")
torch.save(outputs, sys.argv[4])
"""


@torch.no_grad()
def test_a_graft_from_remote_code_gives_the_same_bits(run: Run, tmp_path: Path) -> None:
    text = ids(length=200)  # longer than what attends by one mask
    configs = replace(CONFIG, meta_attention=True), replace(CONFIG, positions="compact")
    models = [trained("llama", config, dtype=torch.float32) for config in configs]
    for number, model in enumerate(models):
        save_graft(model, tmp_path / f"full{number}", full=True)
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(tmp_path / "full0", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.save(text, tmp_path / "ids.pt")
    paths = [tmp_path / name for name in ("ids.pt", "full0", "full1", "outputs.pt")]
    run(GRAFT, *paths, folder=tmp_path)
    plain = make("llama", dtype=torch.float32)(text).logits
    for model, (logits, generated, without) in zip([*models, models[0]], torch.load(paths[-1]), strict=True):
        assert torch.equal(logits, model(text).logits)
        assert torch.equal(
            generated, model.generate(text[:, :40], max_new_tokens=30, do_sample=False, eos_token_id=None)
        )
        assert torch.equal(without, plain)
