"""Sweeps in object stores: `output` may be s3://, gs:// or az://.

Records stay plain files. A driver writes its sweep into a folder of its own machine, and a mirror copies that folder to
the store. Whoever reads a sweep in a store first pulls its records into a folder.

Reading order: `location` (URIs and the folders that belong to them), `store` (one folder of a store: list, read, write,
delete), `layout` (which files are copied, and in which order), `mirror` (driver to store), `pull` (store to folder),
`holder` (which driver's copy a store mirrors), `output` (the folder of a new or a resumed sweep), `view` (the folder of
a sweep to look at).
"""
