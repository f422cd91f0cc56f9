"""Packed experts on a GPU: the values and gradients of their dequantized weights, under autocast too."""

import copy
from typing import Any

import pytest
import torch
from family_bases import base_model

from orchestrator.experts import expert_matrices, pack_experts

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 4], [7, 7, 250, 31, 900, 12, 3]])


def loss_and_gradient(model: Any, precision: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = model.get_input_embeddings()(IDS.cuda()).detach().requires_grad_()
    with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
        logits = model(inputs_embeds=inputs).logits
    logits.float().square().mean().backward()
    assert inputs.grad is not None
    return logits.detach().float(), inputs.grad.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_packed_experts_compute_what_their_dequantized_values_do(family: str, dtype: torch.dtype) -> None:
    plain = base_model(family).requires_grad_(False).to("cuda", dtype)
    quantized = copy.deepcopy(plain)
    pack_experts(quantized, "nf4", True, dtype)
    for name, weight in expert_matrices(plain).items():
        packed = quantized.get_parameter(name)
        whole = packed.dequantized()
        assert whole.dtype == dtype
        weight.data = (whole.mT if packed.is_transposed else whole).contiguous()
    plain.set_experts_implementation("eager")
    precision = torch.bfloat16 if dtype == torch.bfloat16 else None
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip(
        loss_and_gradient(quantized, precision), loss_and_gradient(plain, precision), strict=True
    ):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_scales_move_with_the_codes() -> None:
    quantized = base_model("qwen3_moe").requires_grad_(False)
    pack_experts(quantized, "nf4", True, torch.float32)
    before = {name: weight.dequantized() for name, weight in expert_matrices(quantized).items()}
    for device in ("cuda", "cpu"):
        quantized.to(device)
        for name, weight in expert_matrices(quantized).items():
            assert weight.dequantized().device.type == device
            assert torch.allclose(weight.dequantized().cpu(), before[name], rtol=1e-6)
