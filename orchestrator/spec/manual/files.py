"""The files of this repository that are generated from the specification."""

import json
from pathlib import Path

from orchestrator.embedded import EXPERIMENT
from orchestrator.spec.manual.every_field import print_every_field
from orchestrator.spec.manual.reference import print_reference
from orchestrator.spec.manual.schema import spec_schema
from orchestrator.spec.manual.tree import read_tree


def generated_files() -> dict[str, str]:
    """Return path in the repository -> text.

    The demo and the schema ship with the package and are copied into experiments/, where people look for them.
    """
    schema = spec_schema()
    tree = read_tree(schema)
    schema_text = json.dumps(schema, indent=2) + "\n"
    return {
        "orchestrator/embedded/experiment.schema.json": schema_text,
        "experiments/experiment.schema.json": schema_text,
        "experiments/demo.yaml": Path(EXPERIMENT).read_text(encoding="utf-8"),
        "experiments/every-field.yaml": print_every_field(tree),
        "docs/reference.md": print_reference(tree),
    }
