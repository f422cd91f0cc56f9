"""Spares the objects that stay from later garbage collections."""

import gc


def freeze_garbage_collector() -> None:
    """Exclude all objects that exist now from later garbage collections, for the whole process.

    A collection follows the end of each trial. It need not visit the base and the engine, which stay.
    `gc.unfreeze` reverses this.
    """
    gc.collect()
    gc.freeze()
