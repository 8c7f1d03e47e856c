"""How much of the answer a state holds: bottlenecks and probes."""
