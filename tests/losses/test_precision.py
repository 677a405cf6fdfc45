"""The fused loss keeps its digits: half-precision inputs, autocast, wide gaps, close students; and stays small."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import Head, Objective, cakld, checks, distillation_loss, projection, tile

CAKLD = Objective("cakld", gamma=0.37)


def draw(generator: torch.Generator, tokens: int = 24, vocab: int = 50, width: int = 8) -> list[Tensor]:
    """Hidden states of student and teacher, one weight for both, labels."""
    student, teacher = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    weight = torch.randn(vocab, width, generator=generator)
    return [student, teacher, weight, torch.randint(vocab, (tokens,), generator=generator)]


def exact(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CAKLD and its gradients in fp64, from the given values."""
    hidden, head = student.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = cakld(hidden @ head.T, teacher.double() @ head.detach().T, 0.37).sum()
    hidden_grad, head_grad = torch.autograd.grad(loss, (hidden, head))
    return loss.detach(), hidden_grad, head_grad


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [7, 1000], ids=["cut head", "whole head"])
def test_half_precision_inputs_lose_nothing_but_the_final_rounding(
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    chunk_rows: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher, weight, labels = draw(generator)
    monkeypatch.setattr(projection, "_WIDENED_ELEMENTS", chunk_rows * weight.shape[1])
    hidden, head = student.to(dtype).requires_grad_(), weight.to(head_dtype).requires_grad_()
    out = distillation_loss(hidden, head, teacher.to(dtype), head, labels, objective=CAKLD, tile_tokens=7)
    out.loss_sum.backward()
    loss, hidden_grad, head_grad = exact(hidden, teacher.to(dtype), head)
    assert out.loss_sum.dtype == torch.float32
    assert relative(out.loss_sum.detach(), loss) < 1e-5
    assert hidden.grad is not None
    assert head.grad is not None
    assert (hidden.grad.dtype, head.grad.dtype) == (dtype, head_dtype)
    for grad, want in ((hidden.grad, hidden_grad), (head.grad, head_grad)):
        assert relative(grad, want) < (1e-5 if grad.dtype == torch.float32 else torch.finfo(grad.dtype).eps)


def test_a_loss_scale_comes_before_the_rounding_to_fp16(generator: torch.Generator) -> None:
    student, _, weight, labels = draw(generator)
    hidden = student.half().requires_grad_()
    # The biases make the models differ, and the tiny weight makes the gradient tiny: fp16 alone keeps a bit or two.
    weight *= 1e-7
    ours, theirs = (Head(weight, torch.randn(len(weight), generator=generator)) for _ in range(2))
    scale = 2.0**16

    def run(hidden: Tensor, factor: float) -> Tensor:
        out = distillation_loss(hidden, ours, hidden.detach(), theirs, labels, objective=CAKLD)
        return torch.autograd.grad(out.loss_sum * factor, hidden)[0]

    expected = run(hidden.detach().double().requires_grad_(), 1.0)
    assert expected.abs().max() < 1e-6
    assert relative(run(hidden, 1.0), expected) > 0.01, "nothing to lose: the test proves nothing"
    assert relative(run(hidden, scale), expected * scale) < 1e-3


def test_autocast_does_not_reach_the_logits(generator: torch.Generator) -> None:
    student, teacher, weight, labels = draw(generator)

    def run() -> tuple[Tensor, Tensor]:
        hidden = student.clone().requires_grad_()
        out = distillation_loss(hidden, weight, teacher, weight, labels, objective=CAKLD)
        return out.loss_sum.detach(), torch.autograd.grad(out.loss_sum, hidden)[0]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = run()
        assert (student @ weight.T).dtype == torch.bfloat16, "autocast is not on: the test proves nothing"
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [110.0, 150.0])
@pytest.mark.parametrize("loss_type", ["cakld", "forward_kl", "reverse_kl", "jsd", "ce"])
def test_a_gap_that_breaks_the_published_loss_is_finite_here(dtype: torch.dtype, gap: float, loss_type: str) -> None:
    goal = Objective(loss_type, gamma=0.5 if loss_type == "cakld" else None)
    weight = torch.eye(3).to(dtype).requires_grad_()
    hidden = torch.tensor([[gap, 0.0, -gap], [0.0, -gap, 0.0]]).to(dtype).requires_grad_()
    teacher = torch.tensor([[-gap, 0.0, gap], [gap, gap, gap]]).to(dtype)
    out = distillation_loss(hidden, weight, teacher, weight, torch.tensor([2, 1]), objective=goal)
    out.loss_sum.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert all(value.isfinite() for value in out.sums().values())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("loss_type", ["cakld", "jsd", "ce"])
def test_a_padded_vocabulary_counts_nothing(loss_type: str, softcap: float | None, generator: torch.Generator) -> None:
    student, teacher, weight, labels = draw(generator, vocab=10)
    goal = Objective(loss_type, gamma=0.37 if loss_type == "cakld" else None)
    padded = torch.cat([weight, torch.ones(3, weight.shape[1])])
    off = torch.tensor([0.0] * 10 + [-math.inf] * 3)

    def run(weight: Tensor, bias: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        hidden, head = student.clone().requires_grad_(), Head(weight, bias, logit_softcap=softcap)
        out = distillation_loss(hidden, head, teacher, head, labels, objective=goal)
        return out.sums(), torch.autograd.grad(out.loss_sum, hidden)[0]

    sums, grad = run(padded, off)
    assert grad.isfinite().all()
    if softcap is None:  # a cap turns -inf into a very small but real logit, in the models themselves too
        expected, expected_grad = run(weight, None)
        torch.testing.assert_close(sums, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_a_statistic_that_is_infinite_does_not_spoil_a_loss_that_has_no_part_of_it() -> None:
    hidden, weight = torch.zeros(1, 2, requires_grad=True), torch.zeros(3, 2)
    student = Head(weight, torch.tensor([0.0, 0.0, -math.inf]))  # the teacher says a token that the student cannot
    for goal in (Objective("reverse_kl"), Objective("cakld", gamma=1.0)):
        out = distillation_loss(hidden, student, hidden.detach(), weight, torch.tensor([0]), objective=goal)
        assert out.forward_kl is not None
        assert out.forward_kl.item() == math.inf
        assert out.loss_sum.item() == pytest.approx(math.log(1.5), rel=1e-6)
        assert torch.autograd.grad(out.loss_sum, hidden)[0].isfinite().all()


@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_a_student_close_to_its_teacher_keeps_correct_digits(distance: float, generator: torch.Generator) -> None:
    _, teacher, weight, labels = draw(generator, tokens=64, vocab=2000, width=32)
    hidden = (teacher + distance * torch.randn(64, 32, generator=generator)).requires_grad_()
    out = distillation_loss(hidden, weight, teacher, weight, labels, objective=CAKLD)
    (grad,) = torch.autograd.grad(out.loss_sum, hidden)
    loss, expected, _ = exact(hidden, teacher, weight)
    assert relative(out.loss_sum.detach(), loss) < 1e-5 * 0.1 / distance
    assert relative(grad, expected) < 1e-5 * 0.1 / distance


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_one_tile_of_logits(generator: torch.Generator) -> None:
    tokens, vocab, width, tile_tokens = 64, 400, 4, 8
    student, teacher, weight, labels = draw(generator, tokens, vocab, width)
    hidden, head = student.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        out = distillation_loss(hidden, head, teacher, head, labels, objective=CAKLD, tile_tokens=tile_tokens)
        out.loss_sum.backward()
    assert largest.elements == tile_tokens * vocab < tokens * vocab


def test_temporaries_are_no_larger_than_one_strip(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(8)
    student, teacher = (torch.randn(8, 50, generator=generator) for _ in range(2))
    logits = tile.Tile(student, teacher, labels)
    monkeypatch.setattr(tile, "_CPU_STRIP_ELEMENTS", 3 * 50)
    pieces = list(tile.strips(logits))
    assert [len(piece.labels) for piece in pieces] == [3, 3, 2]
    with Largest() as largest:
        for piece in pieces:
            tile.score_tile(piece, CAKLD, with_gradient=True)
    assert largest.elements == 3 * 50


def test_tiles_are_picked_to_hold_64_mib_of_logits() -> None:
    rows = torch.arange(1000)
    assert [len(cut) for cut in checks.tiles(rows, None, vocab=32_768)] == [512, 488]
    assert len(next(checks.tiles(rows, None, vocab=1 << 30))) == 1
    assert list(checks.tiles(rows[:0], None, vocab=5)) == []


def test_products_that_the_device_sums_in_fp32_are_left_to_it(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_mm, asked = torch.mm, []

    def cuda_like_mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        asked.append((left.dtype, right.dtype, out_dtype))
        assert left.dtype == right.dtype
        return plain_mm(left.to(out_dtype), right.to(out_dtype))

    student, teacher, weight, labels = draw(generator)
    hidden, head = student.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    monkeypatch.setattr(torch, "mm", cuda_like_mm)
    monkeypatch.setattr(projection, "_has_wide_sums", lambda left, right, dtype: left.dtype == right.dtype != dtype)
    out = distillation_loss(hidden, head, teacher.bfloat16(), head, labels, objective=CAKLD, tile_tokens=10)
    out.loss_sum.backward()
    assert asked == [(torch.bfloat16, torch.bfloat16, torch.float32)] * (3 * 4)  # tiles; two logits, two gradients
    loss, hidden_grad, head_grad = exact(hidden, teacher.bfloat16(), head)
    assert relative(out.loss_sum.detach(), loss) < 1e-5
    assert hidden.grad is not None
    assert head.grad is not None
    assert relative(hidden.grad, hidden_grad) < 2**-7
    assert relative(head.grad, head_grad) < 2**-7


def test_only_bf16_gradients_are_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_has_wide_sums", lambda *_: True)
    grad = torch.zeros(1)
    assert projection._can_narrow(grad, torch.zeros(1, dtype=torch.bfloat16))
    assert not projection._can_narrow(grad, torch.zeros(1, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_computes_the_same(dtype: torch.dtype, generator: torch.Generator) -> None:
    student, teacher, weight, labels = draw(generator, tokens=64, vocab=2048, width=64)
    hidden, head = student.to("cuda", dtype).requires_grad_(), (weight * 0.3).to("cuda", dtype).requires_grad_()
    fixed = teacher.to("cuda", dtype)
    out = distillation_loss(hidden, head, fixed, head, labels, objective=CAKLD, tile_tokens=10)
    out.loss_sum.backward()
    loss, hidden_grad, head_grad = exact(hidden, fixed, head)
    assert relative(out.loss_sum.detach(), loss) < 1e-5
    assert hidden.grad is not None
    assert head.grad is not None
    for grad, want in ((hidden.grad, hidden_grad), (head.grad, head_grad)):
        assert relative(grad, want) < (1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": torch.zeros(3)}, r"`weight` must be \[vocab, hidden\]: got weight=\[3\]"),
        ({"bias": torch.zeros(2)}, r"`bias` must be \[vocab\]: got bias=\[2\], weight=\[3, 2\]"),
        ({"logit_scale": math.nan}, "`logit_scale` must be finite: got logit_scale=nan"),
        ({"logit_softcap": 0.0}, "`logit_softcap` must be positive: got logit_softcap=0.0"),
        ({"logit_softcap": math.inf}, "`logit_softcap` must be positive"),
    ],
)
def test_a_head_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Head(**{"weight": torch.zeros(3, 2), **settings})
