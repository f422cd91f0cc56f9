"""The base section: the frozen model beneath the adapters."""

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec.sections.section import Section


class BaseSection(Section):
    """The base model and the form in which it is held while adapters train on it."""

    model: Annotated[str, Field(min_length=1)]
    """Hub id, folder, or `embedded` for the small base that ships with the package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit type of the frozen weights, or none."""
    double_quant: bool = True
    """Quantise the 4-bit scales as well (QLoRA, arXiv 2305.14314, section 3)."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of matrix products, and of the weights that are not quantised."""
    pad_token: Annotated[str, Field(min_length=1)] | None = None
    """Token that fills short rows (on the right); `eos` is the end token; default the tokenizer's own, else `eos`."""
