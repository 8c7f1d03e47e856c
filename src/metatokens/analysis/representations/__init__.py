"""What the states of meta-tokens hold, and what the parts of the model add to its output."""
