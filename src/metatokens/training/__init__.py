"""Training: pre-training, fine-tuning and length extension, with the loop, checkpoints and run folder they share."""
