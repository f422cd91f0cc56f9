"""Score adapters on rows, in each form they may be deployed in.

Modules, in reading order:

    evaluate    the whole procedure: rows, forms, metrics, report
    forms       opens an adapter in a form: on its quantized base, on the original base, merged, ...
    row_scores  loss and token hits, row by row
    metrics     perplexity, exact match, ROUGE, BLEU
    harness     tasks of lm-evaluation-harness
"""
