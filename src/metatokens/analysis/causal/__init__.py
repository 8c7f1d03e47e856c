"""What the answer depends on: states exchanged, edges cut, columns evicted."""
