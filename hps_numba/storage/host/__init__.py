"""The host store: the rows of one table in host memory, and the parts it is made of."""
