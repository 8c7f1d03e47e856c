"""Settings that must be in place before anything imports torch or the hub's client."""

import os

# proof that nothing here touches the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# on tensors this small, threads that wait for each other cost several times the work
os.environ.setdefault("OMP_NUM_THREADS", "1")
