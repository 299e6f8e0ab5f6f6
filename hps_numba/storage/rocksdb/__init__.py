"""RocksDB by the package rocksdict: what the tier ``rocks_db`` and ``.sst`` dumps are made of."""
