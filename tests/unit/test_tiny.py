"""docs/tiny.py shows the idea of the fast engine; it must be right, and small enough to read in one go."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

FILE = Path(__file__).parents[2] / "docs" / "tiny.py"
ROWS = {0: [[1, 5, 9, 2, 7]], 1: [[3, 4, 8], [6, 1, 2, 3, 9, 30]], 2: [[2, 2, 4, 11]]}


@pytest.fixture(scope="module")
def tiny() -> Any:
    spec = importlib.util.spec_from_file_location("tiny", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_slots(tiny: Any, base: Any, dropouts: tuple[float, ...] = (0.0, 0.3, 0.1)) -> Any:
    """Three adapters of ranks 2, 4 and 3 whose B is not zero, so that A has a gradient."""
    slots = tiny.Slots(base, [2, 4, 3], [0.01, 0.02, 0.03], list(dropouts))
    generator = torch.Generator().manual_seed(1)
    for name in slots.b:
        for slot, rank in enumerate([2, 4, 3]):
            slots.b[name][slot, :, :rank] = torch.randn(slots.b[name].shape[1], rank, generator=generator) / 8
    return slots


def test_it_can_be_read_in_one_go() -> None:
    assert len(FILE.read_text().splitlines()) <= 200


def test_the_written_out_gradients_are_those_of_autograd(tiny: Any) -> None:
    base = tiny.Base()
    slots = make_slots(tiny, base)
    leaves = [value.requires_grad_() for _, value in slots.parameters()]
    one = tiny.Pass(base, slots, tiny.flat_batch(ROWS))
    expected = torch.autograd.grad(one.forward().sum(), leaves)
    with torch.no_grad():
        one.backward()
    for (key, _), gradient in zip(slots.parameters(), expected, strict=True):
        assert float(gradient.abs().max()) > 1e-3, key
        torch.testing.assert_close(one.gradients[key], gradient, atol=1e-12, rtol=1e-10)


def test_losses_are_those_of_each_row_by_itself(tiny: Any) -> None:
    """Without dropout: logits of one row with merged weights W + scale B A, by torch's own attention."""
    base = tiny.Base()
    slots = make_slots(tiny, base, (0.0, 0.0, 0.0))
    losses = tiny.Pass(base, slots, tiny.flat_batch(ROWS)).forward()
    for slot, rows in ROWS.items():
        weights = {
            name: weight + slots.scale[slot] * slots.b[name][slot] @ slots.a[name][slot]
            for name, weight in base.linears.items()
        }
        found = []
        for row in rows:
            h = base.embedding[torch.tensor(row)]
            for layer in range(2):
                q, k, v = (h @ weights[f"{layer}.qkv"].T).chunk(3, dim=1)
                attended = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
                h = h + attended[0] @ weights[f"{layer}.o"].T
                h = h + torch.nn.functional.silu(h @ weights[f"{layer}.up"].T) @ weights[f"{layer}.down"].T
            logits = (h @ base.embedding.T)[:-1]
            found += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none").tolist()
        assert float(losses[slot]) == pytest.approx(sum(found) / len(found), rel=1e-10)


def test_a_trial_trains_beside_others_as_it_does_alone(tiny: Any) -> None:
    base = tiny.Base()
    together, alone = make_slots(tiny, base), make_slots(tiny, base)
    for _ in range(3):
        losses = tiny.train_step(base, together, ROWS)
        solo = tiny.train_step(base, alone, {1: ROWS[1]})
        assert float(losses[1]) == pytest.approx(float(solo[1]), rel=1e-12)
    start = make_slots(tiny, base)
    for (key, ours), (_, theirs), (_, before) in zip(
        together.parameters(), alone.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-12, rtol=1e-10)
        assert torch.equal(theirs[0], before[0]), f"{key}: a slot without rows stays as it is"
        beyond = ours[0, 2:] if key[0] == "a" else ours[0, :, 2:]
        assert not beyond.any(), f"{key}: what lies beyond the rank of slot 0 stays zero"


def test_masks_drop_their_share_and_change_with_the_step(tiny: Any) -> None:
    base = tiny.Base()
    slots = make_slots(tiny, base, (0.3, 0.3, 0.3))
    batch = tiny.flat_batch({0: [list(range(32)) * 40]})
    first = tiny.dropout_mask(batch, slots, 0, 64)
    assert float((first == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(first.mean()) == pytest.approx(1.0, abs=0.01)
    slots.step += 1
    later = tiny.dropout_mask(batch, slots, 0, 64)
    assert float(((first == 0) == (later == 0)).double().mean()) == pytest.approx(0.3**2 + 0.7**2, abs=0.01)
