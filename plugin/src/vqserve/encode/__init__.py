"""The encoder: weights to codes. Statistics, codebooks, block sweep, allocation of tiers, streaming pipeline."""
