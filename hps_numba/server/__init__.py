"""The parameter server: models, tables, lookups and writes."""
