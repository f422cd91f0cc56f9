"""What the fields of an experiment are, told three ways from the models alone: JSON Schema, reference, example."""
