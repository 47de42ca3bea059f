import pytest
import torch
from torchaudio.functional import rnnt_loss

from sparse_pathways.asr.loss import distillation_loss, transducer_loss

CASES = {  # B, T, U, V
    "one-cell": (1, 1, 1, 3),
    "more-labels-than-frames": (3, 2, 9, 5),
    "one-frame": (2, 1, 4, 5),
    "batch": (4, 13, 6, 11),
}


def problem(rng, batch, frames, labels, symbols):
    logits = 3 * torch.randn(batch, frames, labels + 1, symbols, generator=rng)
    targets = torch.randint(0, symbols - 1, (batch, labels), generator=rng)
    logit_lengths = torch.randint(1, frames + 1, (batch,), generator=rng)
    target_lengths = torch.randint(0, labels + 1, (batch,), generator=rng)
    logit_lengths[0], target_lengths[-1] = frames, labels
    return logits.requires_grad_(), targets, logit_lengths, target_lengths, symbols - 1


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_torchaudio(rng, case):
    logits, targets, logit_lengths, target_lengths, blank = problem(rng, *CASES[case])
    weights = torch.rand(len(targets), generator=rng)
    expected = rnnt_loss(
        logits, targets.int(), logit_lengths.int(), target_lengths.int(), blank=blank, reduction="none"
    )
    (expected_grad,) = torch.autograd.grad(expected @ weights, logits)
    actual = transducer_loss(logits, targets, logit_lengths, target_lengths, blank)
    (grad,) = torch.autograd.grad(actual @ weights, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


def test_no_labels_is_the_sum_of_the_blanks(rng):
    logits = torch.randn(2, 4, 1, 3, generator=rng)
    blanks = logits.log_softmax(-1)[:, :, 0, 2]
    loss = transducer_loss(logits, torch.zeros(2, 0), torch.tensor([4, 2]), torch.tensor([0, 0]), 2)
    torch.testing.assert_close(loss, -torch.stack([blanks[0].sum(), blanks[1, :2].sum()]))


def test_padding_has_neither_value_nor_gradient(rng):
    logits, targets, _, _, blank = problem(rng, 1, 5, 3, 4)
    padded = torch.full((1, 8, 6, 4), 50.0)
    padded[:, :5, :4] = logits.detach()
    padded.requires_grad_()
    lengths = torch.tensor([5]), torch.tensor([3])
    more_targets = torch.cat([targets, torch.ones(1, 2, dtype=torch.long)], 1)
    loss = transducer_loss(padded, more_targets, *lengths, blank)
    torch.testing.assert_close(loss, transducer_loss(logits, targets, *lengths, blank))
    loss.sum().backward()
    padded.grad[:, :5, :4] = 0
    assert padded.grad.abs().max() == 0


def test_targets_must_fit_the_logits():
    with pytest.raises(ValueError, match=r"targets \(2, 3\); want \(2, 4\)"):
        transducer_loss(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3), torch.tensor([3, 3]), torch.tensor([3, 3]), 3)


def test_distillation_is_the_mean_divergence_over_valid_cells():
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 4, 7, generator=draw)
    frames, states = torch.tensor([5, 3]), torch.tensor([2, 4])
    cells = []
    for b in range(2):
        for t in range(int(frames[b])):
            for u in range(int(states[b])):
                p, q = (one[b, t, u].double().softmax(-1) for one in (teacher, student))
                cells.append(float((p * (p / q).log()).sum()))
    student.requires_grad_()
    loss = distillation_loss(student, teacher, frames, states)
    assert loss.item() == pytest.approx(sum(cells) / len(cells), rel=1e-5)
    loss.backward()
    assert student.grad[1, 3:].abs().max() == 0 and student.grad[0, :, 2:].abs().max() == 0
    assert student.grad[0, :, :2].abs().min() > 0
    assert distillation_loss(teacher, teacher, frames, states).item() == pytest.approx(0, abs=1e-6)
    flat = distillation_loss(student[:, :, 0], teacher[:, :, 0], frames)
    assert flat.item() == pytest.approx(distillation_loss(student[:, :, :1], teacher[:, :, :1], frames, states).item())
