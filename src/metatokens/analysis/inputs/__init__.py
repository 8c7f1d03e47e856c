"""What measures are taken of: documents, minimal pairs and labelled states of one model."""
