"""How far a student is from its teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lq.functional.fake_quant import widened


def soft_targets_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T² · mean over positions of Σ_c p_c (log p_c - log q_c)``, ``p = softmax(teacher / T)``, ``q = softmax(student / T)``.

    Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2: ``T²`` keeps the
    size of the gradient. Takes logits ``(..., classes)`` of any floating dtype; returns a scalar, at least float32.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> soft_targets_loss(logits, logits).item(), round(soft_targets_loss(logits, 0 * logits, temperature=2.0).item(), 3)
    (0.0, 0.302)
    """
    log_p, log_q = (widened(logits).div(temperature).log_softmax(dim=-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean((student - teacher)²) / mean(teacher²)`` of floating tensors of one shape: a scalar, at least float32.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])).item()
    0.5
    """
    power = widened(teacher).square().mean()
    # where the teacher is zero throughout, there is nothing to be relative to
    return F.mse_loss(widened(student), widened(teacher)) / torch.where(power > 0, power, 1.0)
