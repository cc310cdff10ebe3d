"""Benchmarks of the library and of its peers, as `ucxgossip bench` runs them."""
