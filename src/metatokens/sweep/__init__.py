"""Sweeps: grids of fine-tuning runs with matched budgets, run in processes of their own, told as one table."""
