"""The base section: the frozen model beneath the adapters."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import Section


class BaseSection(Section):
    """The base model and the form in which it is held while adapters train on it."""

    model: Annotated[str, Field(min_length=1)]
    """Hub id, folder, or `embedded` for the small base that ships with the package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """Type of the frozen weights: 4-bit, 8-bit (LLM.int8(), arXiv 2208.07339), or none."""
    double_quant: bool = True
    """Quantise the 4-bit scales as well (QLoRA, arXiv 2305.14314, section 3)."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of matrix products, and of the weights that are not quantised."""
    pad_token: Annotated[str, Field(min_length=1)] | None = None
    """Token that fills short rows (on the right); `eos` is the end token; default the tokenizer's own, else `eos`."""
    eos_token: Annotated[str, Field(min_length=1)] | None = None
    """End token, instead of the tokenizer's own: rows and templates that write `eos_token` end with it."""
    new_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()
    """Tokens whose embeddings train beside the adapter; those that the tokenizer has not are added to it."""

    @property
    def is_4bit(self) -> bool:
        """Whether its weights are held in 4 bits."""
        return self.quantization in ("nf4", "fp4")

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> Self:
        if self.revision is not None and (self.model == "embedded" or self.model.startswith("/")):
            raise ValueError(f"revision {self.revision} belongs to a base of the hub, but model is {self.model}")
        return self

    @model_validator(mode="after")
    def _tokens_differ(self) -> Self:
        if twice := sorted({token for token in self.new_tokens if self.new_tokens.count(token) > 1}):
            raise ValueError(f"new_tokens names {twice[0]!r} twice")
        return self
