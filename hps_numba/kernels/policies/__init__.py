"""Cache policies, one a file: who leaves a full set. ``_policy`` says what a policy is."""
