"""llama.cpp's converter, told the pre-tokenizer: `python -m THIS NAME SCRIPT ARGUMENTS...`. Run by `gguf` alone.

The converter knows a pre-tokenizer by a hash of the token ids of one text, and so those of published vocabularies
alone; no option names one. Here its own finding comes first, and the name is taken where it has none.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    name, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    converter = importlib.import_module(Path(script).stem)
    # In the module itself, or since 2026 in a package beside it.
    text_model = sys.modules[converter.ModelBase.__module__].TextModel
    own = text_model.get_vocab_base_pre

    def found(self: Any, tokenizer: Any) -> str:
        try:
            return str(own(self, tokenizer))
        except NotImplementedError:  # "BPE pre-tokenizer was not recognized"
            return name

    text_model.get_vocab_base_pre = found
    converter.main()


if __name__ == "__main__":
    main()
