"""The drafters, by name."""

from dspark_jax.drafters.dspark import DSpark

DRAFTERS = {"dspark": DSpark}
