"""A frozen base that is too large for one GPU, held in pieces by several processes of a machine, one for each GPU.

Each process trains trials of its own. Just before a decoder layer is used, its packed weights are gathered from all
processes; the next layer is gathered meanwhile. Adapters, gradients and moments belong to one process, so nothing is
ever reduced.

Reading order: `layout.py` (the bytes of a layer), `place.py` and `group.py` (the processes), `gatherer.py` (the thread
that gathers), `base.py` (a base in pieces).
"""
