"""Cache policies, one per file: which row of a full set is evicted. ``_policy`` says what a policy is."""
