"""How results are told: their schema, tables and figures."""
