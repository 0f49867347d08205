"""Parts of `tools.make_checkpoint`: sizes, tensors, weights, and a measurement of what they make of routing."""
