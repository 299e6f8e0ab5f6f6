"""The host store: the rows of one table in host memory, in a hash table that is read without a lock."""
