"""Running experts on a device that the host runs ahead of: the slot table, what is read back, and the executor."""
