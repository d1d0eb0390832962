from __future__ import annotations

import math

import pytest
import torch

from training.model import group_loss

NAN = float("nan")


def test_softmax_term_by_hand() -> None:
    margins = torch.tensor([[math.log(3.0), 0.0, 50.0]])
    valid = torch.tensor([[True, True, False]])
    loss = group_loss(margins, valid, torch.full((1, 3), NAN), distil=1.0, temperature=1.0, binary=0.0)
    assert float(loss) == pytest.approx(math.log(4 / 3))


def test_binary_term_by_hand() -> None:
    margins = torch.zeros(1, 2)
    valid = torch.tensor([[True, True]])
    loss = group_loss(margins, valid, torch.full((1, 2), NAN), distil=0.0, temperature=1.0, binary=1.0)
    assert float(loss) == pytest.approx(2 * math.log(2))


def test_distillation_is_zero_where_the_student_agrees_and_skips_what_the_teacher_did_not_score() -> None:
    margins, valid = torch.tensor([[2.0, 1.0, 7.0]]), torch.ones(1, 3, dtype=torch.bool)
    teacher = torch.tensor([[0.2, 0.1, NAN]])
    plain = group_loss(margins, valid, teacher, distil=0.0, temperature=0.1, binary=0.0)
    agreed = group_loss(margins, valid, teacher, distil=1.0, temperature=0.1, binary=0.0)
    assert float(agreed) == pytest.approx(float(plain), abs=1e-5)
    opposite = group_loss(margins, valid, torch.tensor([[0.1, 0.2, NAN]]), distil=1.0, temperature=0.1, binary=0.0)
    assert float(opposite) > float(plain) + 0.1
