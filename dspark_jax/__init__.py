"""DSpark speculative decoding in JAX."""
