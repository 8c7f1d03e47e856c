"""Text to batches: sources, tokenizers, token shards, injection of meta-tokens, loaders.

Import the modules: this package imports none of them, so that `metatokens.data.injection` needs numpy only.
"""
