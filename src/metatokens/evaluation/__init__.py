"""Perplexity, intervals and timing."""
