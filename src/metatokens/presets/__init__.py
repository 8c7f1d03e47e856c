"""Presets as YAML; `metatokens.config.loading` reads them."""
