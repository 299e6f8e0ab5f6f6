"""Storage tiers, one per file; ``_tier.py`` says what a tier is."""
