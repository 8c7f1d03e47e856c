"""Speed and memory side by side: all contenders of a question take turns in one run, each beside its limit.

A question is one file here, a contender one function in the question's file of contenders. Each question builds
`Contender`s and hands them to `metatokens.bench.measuring.measure`, which times them round by round and gives medians,
ratios of the same round, and what the machine's own matrix and copy rates would allow at best. `bench training` asks
about the training step.
"""
