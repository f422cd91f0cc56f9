"""The files of this repository that are made from the specification."""

import json

from orchestrator.spec.manual.every_field import print_every_field
from orchestrator.spec.manual.reference import print_reference
from orchestrator.spec.manual.schema import spec_schema
from orchestrator.spec.manual.tree import read_tree


def made_files() -> dict[str, str]:
    """Path in the repository -> text."""
    schema = spec_schema()
    tree = read_tree(schema)
    return {
        # Beside the demo, with which it ships; experiments/ has a link to either.
        "orchestrator/embedded/experiment.schema.json": json.dumps(schema, indent=2) + "\n",
        "experiments/every-field.yaml": print_every_field(tree),
        "docs/reference.md": print_reference(tree),
    }
