"""Settings that must be in place before anything imports torch or the hub's client."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

# proof that nothing here touches the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# on tensors this small, threads that wait for each other cost several times the work
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A checkpoint flushes some sixty files to the disk, which takes longer than the training of a tiny model. Files in
# memory need no flush, and outlive a process that is killed as well.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture
def other_copy_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the cache layers a second time, as the code of a checkpoint does; caches are then made of the newer copy.

    transformers knows a layer by its type alone, and all copies have the same.
    """
    from transformers import cache_utils

    from metatokens.model import cache

    for mapping in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        monkeypatch.setitem(mapping, "meta_attention", mapping["meta_attention"])
    spec = importlib.util.spec_from_file_location("other_copy_of_the_cache", cache.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
