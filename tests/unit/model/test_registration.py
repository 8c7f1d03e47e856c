"""`import metatokens` is light, and yet transformers' Auto classes know the model, whichever is imported first."""

import os
import subprocess
import sys

import pytest

IS_REGISTERED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("metatokens", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=8)
names = [type(auto.from_config(config)).__name__ for auto in (AutoModel, AutoModelForCausalLM)]
assert names == ["MetaTokenModel", "MetaTokenForCausalLM"], names
"""
PROGRAMS = {
    "package_first": "import metatokens" + IS_REGISTERED,
    "transformers_first": "import transformers, metatokens" + IS_REGISTERED,
    "auto_classes_first": "from transformers import AutoModelForCausalLM\nimport metatokens" + IS_REGISTERED,
    "model_of_transformers_first": "import metatokens\nfrom transformers import GPT2LMHeadModel" + IS_REGISTERED,
    "layers_first": "import metatokens\nfrom transformers import modeling_layers" + IS_REGISTERED,
}


# each in a fork of one process that has imported torch, which takes most of the time and has no part in the order
IN_FORKS = f"""
import os, sys
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.tensor
assert not {{"metatokens", "transformers"}} & set(sys.modules)
for name, program in {PROGRAMS!r}.items():
    child = os.fork()
    if not child:
        try:
            exec(program, {{}})
            print(name, "registered", sep=": ", flush=True)
        except BaseException as error:
            print(name, repr(error), sep=": ", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def run_python(program: str) -> str:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    run_python("import metatokens, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


def test_listing_the_packages_names_imports_no_torch() -> None:
    run_python("import metatokens, sys; assert 'MetaTokenConfig' in dir(metatokens); assert 'torch' not in sys.modules")


@pytest.fixture(scope="module", name="outcomes")
def fixture_outcomes() -> list[str]:
    return run_python(IN_FORKS).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("order", PROGRAMS)
def test_auto_classes_know_the_model_whatever_is_imported_first(outcomes: list[str], order: str) -> None:
    assert f"{order}: registered" in outcomes


def test_unknown_public_name_raises_attribute_error() -> None:
    import metatokens

    with pytest.raises(AttributeError, match="MetaTokensConfig"):
        _ = metatokens.MetaTokensConfig
