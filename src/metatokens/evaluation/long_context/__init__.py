"""The long-context suite: what a model finds in a long text, and what it loses when its cache forgets.

Everything is made here from a seed, in the manner of RULER (Hsieh et al. 2024), of the passkey task (Mohtashami and
Jaggi 2023) and of BABILong (Kuratov et al. 2024); nothing is downloaded. A task is one function in one file of `tasks`.
"""
