"""Where rows are: the host store, slower tiers, and sparse models on disk."""
