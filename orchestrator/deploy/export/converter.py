"""llama.cpp's converter, given what it cannot find itself: `python -m THIS PRE_TOKENIZER STOPS SCRIPT ARGUMENTS...`.

Run by `gguf` alone. The converter knows a pre-tokenizer by a hash of the token ids of one text, and so those of
published vocabularies alone; no option names one. Here its own finding comes first, and the name is taken where it has
none. Of the stop tokens it reads the tokenizer's EOS alone; the file has room for two more.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the converter.

    Arguments of the process: a pre-tokenizer by llama.cpp's name, or nothing; ids of stop tokens with commas; the
    converter's script; its own arguments.
    """
    name, stops, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    converter = importlib.import_module(Path(script).stem)
    if name:
        _name_pre_tokenizer(converter, name)
    _write_stops([int(stop) for stop in stops.split(",") if stop])
    converter.main()


def _name_pre_tokenizer(converter: Any, name: str) -> None:
    # In the module itself, or since 2026 in a package beside it.
    text_model = sys.modules[converter.ModelBase.__module__].TextModel
    own = text_model.get_vocab_base_pre

    def found(self: Any, tokenizer: Any) -> str:
        try:
            return str(own(self, tokenizer))
        except NotImplementedError:  # "BPE pre-tokenizer was not recognized"
            return name

    text_model.get_vocab_base_pre = found


def _write_stops(stops: list[int]) -> None:
    """Write stop tokens other than the EOS as `eot` and `eom`, at which llama.cpp stops as well."""
    from gguf import SpecialVocab

    own = SpecialVocab.add_to_gguf

    def add(self: Any, *arguments: Any, **options: Any) -> None:
        known = self.special_token_ids
        written = {known.get(kind) for kind in ("eos", "eot", "eom")}
        free = [kind for kind in ("eot", "eom") if kind not in known]
        known.update(zip(free, [stop for stop in stops if stop not in written], strict=False))
        own(self, *arguments, **options)

    SpecialVocab.add_to_gguf = add  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
