"""Task files of lm-evaluation-harness: one for each task of the suite; `documents` makes their texts."""
