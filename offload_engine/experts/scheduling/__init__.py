"""Which experts are in fast memory and which come next: decisions alone, without torch; the simulator runs them."""
