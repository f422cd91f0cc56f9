"""Run llama.cpp's converter with two patches: `python -m THIS PRE_TOKENIZER STOPS SCRIPT ARGUMENTS...`.

Only `gguf` runs this module. The patches:

- Pre-tokenizer. The converter recognizes one by a hash of the token ids of a test text, so only those of published
  vocabularies, and has no option to name one. Here the given name is used if the converter recognizes none.
- Stop tokens. The converter reads only the tokenizer's EOS. Here up to two more are written into the file.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the converter.

    Process arguments: llama.cpp's name of a pre-tokenizer, or an empty string; comma-separated ids of stop tokens; the
    converter's script; the arguments of that script.
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
    # The class is in the script itself, or (since 2026) in a package next to it.
    text_model = sys.modules[converter.ModelBase.__module__].TextModel
    own = text_model.get_vocab_base_pre

    def found(self: Any, tokenizer: Any) -> str:
        try:
            return str(own(self, tokenizer))
        except NotImplementedError:  # "BPE pre-tokenizer was not recognized"
            return name

    text_model.get_vocab_base_pre = found


def _write_stops(stops: list[int]) -> None:
    """Write the stop tokens other than EOS as `eot` and `eom`. llama.cpp also stops at these."""
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
