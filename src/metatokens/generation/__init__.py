"""Cached decoding with scheduled meta-tokens."""
