"""What earlier sweeps say about a new one.

Reading order: `kinship` (which sweeps can be compared), `evidence` (finished trials for one sweep, `--warm-from`),
`library` (the file that a team keeps: best values by base and data).
"""
