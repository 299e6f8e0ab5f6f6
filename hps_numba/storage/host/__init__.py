"""The host store: rows of one table in host memory."""
