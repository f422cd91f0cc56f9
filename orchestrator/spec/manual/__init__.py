"""The fields of an experiment file, printed three ways from the models alone: JSON Schema, reference, example.

Reading order: `schema` (JSON Schema from the pydantic models), `tree` (the schema as a small tree of fields),
`reference` and `every_field` (print the tree), `files` (which file of the repository holds what).
"""
