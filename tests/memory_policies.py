"""Policies of memory mode, and batches that tell them apart, for the tests."""

from typing import Any

POLICIES: dict[str, dict[str, Any]] = {
    "evicted": {"anchors": "meta", "window": 4, "num_sinks": 2},
    "always": {"anchors": "meta", "window": 3, "num_sinks": 0, "reveal": "always"},
    "limited": {"anchors": "meta", "window": 3, "num_sinks": 1, "memory_limit": 2},
    "every": {"window": 4, "num_sinks": 2, "anchors": "every", "every": 3},
    "every_limited": {"window": 2, "num_sinks": 1, "anchors": "every", "every": 2, "memory_limit": 2},
    "pooled": {"window": 3, "num_sinks": 1, "anchors": "pooled"},
    "pooled_limited": {"window": 5, "num_sinks": 2, "anchors": "pooled", "reveal": "always", "memory_limit": 2},
    "text_positions": {"anchors": "meta", "window": 4, "num_sinks": 1, "positions": "text"},
}
BATCHES = {
    "full": ("x_xxx_xx_xxxx_xxxxx_x_xx", "xxxxxxxxxxxxxxxxxxxxxxxx", "__x_xxxx_xx_xxxxxxxxx_xx"),
    "padded": ("......xx_xxxx_xxxxx_x_xx", "xx_xxxxx_xxx_xx_xx......", "xx_x...xx_xx_..xxx_xxxxx"),
}
