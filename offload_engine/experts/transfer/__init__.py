"""Moving experts into slots, and ordering every use of a slot against its moves."""
