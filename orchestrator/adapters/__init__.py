"""Adapter bundles: folders with a PEFT adapter, its tokenizer, and a record of where it came from.

Modules, in reading order:

    stops            stop tokens of a model and of a bundle
    tokenizer_files  the files of a tokenizer
    generate         answers in batches
    card             the README of a bundle, with the hub's metadata
    row_metrics      metrics of answers, row by row: exact match, and a user's own function
    bundle           write, verify and replace a bundle; its manifest with a sha256 of every file

Training writes bundles, `orchestrator.deploy` reads them. torch, peft and transformers are imported inside functions:
the commands that only read a manifest need none of them.
"""
