"""The drafters, by name."""

from dspark_jax.drafters.dspark import DSpark
from dspark_jax.drafters.eagle3 import Eagle3
from dspark_jax.drafters.mtp import MTP

DRAFTERS = {"dspark": DSpark, "eagle3": Eagle3, "mtp": MTP}
