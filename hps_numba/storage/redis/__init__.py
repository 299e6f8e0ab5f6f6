"""Rows in Redis or Valkey: what the tier ``redis_cluster`` is made of."""
