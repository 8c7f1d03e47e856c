"""A causal language model in one GGUF file, which transformers turns back into ordinary weights."""

import struct
from pathlib import Path
from typing import Any

from metatokens.errors import CheckpointError, UsageError

# what transformers raises for a file that is cut, of another format, or of a model that it does not know
_DO_NOT_LOAD = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Return the model of a GGUF file, in float32 and evaluation mode, and its tokenizer, both of transformers.

    It can be grafted, and saved as a folder of ordinary weights.

    Raises:
        UsageError: the package gguf is not installed.
        CheckpointError: there is no such file, or transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    if not path.is_file():
        raise CheckpointError(str(path), expected="a GGUF file", found="none", remedy="check the spelling")
    bar_was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # trust_remote_code stays False: a GGUF file holds no code
        options = {"gguf_file": path.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        # where there are kernels for them, weights would stay quantised
        whole = GgufConfig(gguf_file=path.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, quantization_config=whole, **options
        )
    except ImportError as error:
        raise UsageError(
            str(path),
            expected="the package gguf, which reads such a file",
            found=str(error),
            remedy="run `pip install gguf`",
        ) from None
    except (*_DO_NOT_LOAD, struct.error) as error:
        raise CheckpointError(
            str(path),
            expected="a causal language model that transformers reads from GGUF",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="use another file, or a folder of safetensors",
        ) from None
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()
    return model.eval(), tokenizer
