"""Storage tiers, one a file; ``_tier.py`` says what a tier is."""
