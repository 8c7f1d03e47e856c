"""Evaluation of models: perplexity, recall, interventions, intervals, tests and timing."""
