"""The decomposition of what meta-tokens add, as one command at three scales.

A scale is a folder here: plan.yaml names its parts and their commands, and the sweeps lie beside it. `plan` reads it,
`cost` says what it takes, `running` runs it, and `contrasts` judges the contrasts that were named before the first run.
"""
