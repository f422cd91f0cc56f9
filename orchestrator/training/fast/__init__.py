"""The fast engine: adapters on one base, stepped together over flat rows, without padding and without waiting."""
