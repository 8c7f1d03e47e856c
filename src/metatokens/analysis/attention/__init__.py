"""Where attention goes, and what meta-tokens do to it."""
