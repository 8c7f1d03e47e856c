"""Take a model apart: what it computes at its meta-tokens, and what follows from it."""
