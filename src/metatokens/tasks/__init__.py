"""The recall tasks of the paper: instances as text, their encoding with meta-tokens, and their solvers.

Import the modules: this package imports none of them. `metatokens.tasks.registry.make_instance` is the entry point.
"""
