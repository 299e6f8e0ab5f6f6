"""The parameter server: ``HPS``, its models and tables, lookups, writes, plan and statistics."""
