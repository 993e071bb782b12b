"""D3Diff: the noise and the loss of masked discrete diffusion with a score term, on a fused language-model head."""

from .losses import JointStats, LossStats, joint_loss, loss, loss_from_logits, next_token_loss, noise, shift_labels
from .objective import READINGS, Objective
from .schedules import Schedule, log_ratio, ratio, schedule

__all__ = [
    "READINGS",
    "JointStats",
    "LossStats",
    "Objective",
    "Schedule",
    "joint_loss",
    "log_ratio",
    "loss",
    "loss_from_logits",
    "next_token_loss",
    "noise",
    "ratio",
    "schedule",
    "shift_labels",
]
