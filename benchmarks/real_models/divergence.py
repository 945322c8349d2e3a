"""KL between two states read by one head, in chunks: no logits of a whole row are ever held."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.real_models.decoder import compiled

CHUNK = 4096  # tokens whose logits are in memory


def _with_slope(
    student_CD: Tensor, teacher_CD: Tensor, head_VD: Tensor, share_C: Tensor
) -> tuple[Tensor, Tensor]:
    log_s = (student_CD @ head_VD.T).float().log_softmax(-1)
    log_t = (teacher_CD @ head_VD.T).float().log_softmax(-1)
    t = log_t.exp()
    kl_C = (t * (log_t - log_s)).sum(-1)
    slope = ((log_s.exp() - t) * share_C[:, None]).to(student_CD.dtype)
    return kl_C, slope @ head_VD


@torch.no_grad()
def kl_with_slope(
    student_BTD: Tensor, teacher_BTD: Tensor, head_VD: Tensor, share_B: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of every token [B, T], and the gradient of Σ share·KL/T by the student's states.

    The gradient is written down, softmax(student) - softmax(teacher), instead of recorded: student and
    teacher share the head, and one compiled function reads both logits.
    """
    B, T, D = student_BTD.shape
    share = (share_B / T)[:, None].expand(B, T).reshape(-1).float().contiguous()
    student, teacher = student_BTD.reshape(-1, D), teacher_BTD.reshape(-1, D)
    slope, kl = torch.empty_like(student), torch.empty(B * T, device=student.device)
    for a in range(0, B * T, CHUNK):
        z = min(B * T, a + CHUNK)
        kl[a:z], slope[a:z] = compiled(_with_slope)(student[a:z], teacher[a:z], head_VD, share[a:z])
    return kl.view(B, T), slope.view(B, T, D)


def _exact(student_CD: Tensor, teacher_CD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    s, t = logits(student_CD, head_VD), logits(teacher_CD, head_VD)
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1), s.argmax(-1) == t.argmax(-1)


def logits(state_CD: Tensor, head_VD: Tensor) -> Tensor:
    """In fp32, also on a GPU: rounded to bf16 they alone make a KL of 0.001."""
    if state_CD.device.type == "cuda":
        return torch.mm(state_CD, head_VD.T, out_dtype=torch.float32)
    return state_CD.float() @ head_VD.float().T


@torch.no_grad()
def kl_and_agreement(student_TD: Tensor, teacher_TD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """KL of every token [T], and whether both would say the same next token."""
    parts = [
        _exact(student_TD[a : a + CHUNK], teacher_TD[a : a + CHUNK], head_VD)
        for a in range(0, len(student_TD), CHUNK)
    ]
    kl, same = zip(*parts, strict=True)
    return torch.cat(kl), torch.cat(same)
