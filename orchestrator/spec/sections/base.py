"""The base section: the frozen model under the adapters."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.honored import ORCHESTRATOR, HonoredBy
from orchestrator.spec.sections.section import Section


class BaseSection(Section):
    """The base model, and how it is held in memory while adapters train on it."""

    model: Annotated[str, Field(min_length=1), ORCHESTRATOR]
    """Hub id, folder, or `embedded` for the small base that ships with the package."""
    revision: Annotated[str | None, ORCHESTRATOR] = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: Annotated[bool, ORCHESTRATOR] = False
    """Run Python code that comes with the model."""
    quantization: Annotated[
        Literal["nf4", "fp4", "int8", "none"], HonoredBy(orchestrator=True, fast_values=("nf4", "fp4", "none"))
    ] = "nf4"
    """Type of the frozen weights: 4-bit (nf4, fp4), 8-bit (int8: LLM.int8(), arXiv 2208.07339), or not quantized."""
    double_quant: Annotated[bool, ORCHESTRATOR] = True
    """Quantize the scales of 4-bit weights too (QLoRA, arXiv 2305.14314, section 3)."""
    compute_dtype: Annotated[Literal["bfloat16", "float16", "float32"], ORCHESTRATOR] = "bfloat16"
    """Type of matrix products, and of weights that are not quantized."""
    pad_token: Annotated[Annotated[str, Field(min_length=1)] | None, ORCHESTRATOR] = None
    """Token that pads short rows on the right. `eos` is the end token. Default: the tokenizer's pad token, or `eos` if
    it has none."""
    eos_token: Annotated[Annotated[str, Field(min_length=1)] | None, ORCHESTRATOR] = None
    """End token, instead of the tokenizer's own: rows, and templates that write `eos_token`, end with it."""
    new_tokens: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(strict=False),
        HonoredBy(orchestrator=True, fast_values=((),)),
    ] = ()
    """Tokens whose embeddings train with the adapter. Tokens that the tokenizer does not know are added to it."""

    @property
    def is_4bit(self) -> bool:
        """Whether the weights are held in 4 bits."""
        return self.quantization in ("nf4", "fp4")

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> Self:
        if self.revision is not None and (self.model == "embedded" or self.model.startswith("/")):
            raise ValueError(f"revision {self.revision} belongs to a base on the hub, but model is {self.model}")
        return self

    @model_validator(mode="after")
    def _tokens_differ(self) -> Self:
        if twice := sorted({token for token in self.new_tokens if self.new_tokens.count(token) > 1}):
            raise ValueError(f"new_tokens contains {twice[0]!r} twice")
        return self
