"""Storage tiers, one per file; ``_tier.py`` is their interface."""
