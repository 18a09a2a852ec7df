"""Server steps on the product: what the adapters of the clients add to a layer, as a matrix.

    Delta = sum_i p_i gamma_i B_i A_i = L R    L = [p_1 gamma_1 B_1, ...] (out, q)
                                               R = [A_1; A_2; ...]        (q, in), q = sum_i r_i

All arithmetic is in fp64 on factors; Delta itself, out x in, is never formed. A client may have
fewer rows than r, and a gamma of its own.

FlexLoRA (arXiv 2402.11505), FedEx-LoRA (2410.09432), FLoRA (2409.05976), HetLoRA (2401.06432).
Needs no torch when it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfed.methods.server import CommonLayer, SentLayer

if TYPE_CHECKING:
    import torch


def stacks(sent: SentLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """L (out, q) and R (q, in), fp64, with Delta = L R, without what lies beyond a rank."""
    a_nri, b_nor = sent.factors["A"].double(), sent.factors["B"].double()
    weighted = b_nor * (sent.weights * sent.gammas).view(-1, 1, 1)
    held = [
        client * a_nri.shape[1] + row for client, r in enumerate(sent.ranks) for row in range(r)
    ]
    return weighted.transpose(0, 1).flatten(1)[:, held], a_nri.flatten(0, 1)[held]


def svd_of_product(
    left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U, S, V^T of left @ right, by QR of both and the SVD of a small matrix.

    The largest number of each row of V^T is positive, so the result does not depend on the signs
    that a library chooses.

    Args:
        left: (out, q).
        right: (q, in).

    Returns:
        (out, k), (k,) in descending order, (k, in), where k = min(out, in, q).
    """
    import torch

    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, vt = q_left @ u, vt @ q_right.T
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return u * signs.T, s, vt * signs


def flexlora(sent: SentLayer) -> CommonLayer:
    """The best approximation of Delta with r rows: U S V^T = Delta, B = U_r S_r / gamma, A = V_r^T.

    A client of rank r_i then takes the first r_i rows and columns, which is the best approximation
    with r_i rows, and B with its own gamma (``Method.keeps_product``).

    Where Delta has fewer than r singular values above the rounding of fp64, the rows of A beyond
    are those of before the round, and the columns of B are zero.
    """
    import torch

    u, s, vt = svd_of_product(*stacks(sent))
    before_a, before_b = sent.before["A"], sent.before["B"]
    rounding = s[0] * max(len(u), vt.shape[1]) * torch.finfo(s.dtype).eps
    rows = min(len(before_a), int((s > rounding).sum()))
    a, b = before_a.clone(), before_b.new_zeros(before_b.shape)
    a[:rows] = vt[:rows].to(a.dtype)
    b[:, :rows] = (u[:, :rows] * (s[:rows] / sent.common_gamma)).to(b.dtype)
    return CommonLayer({"A": a, "B": b})


def norm_of_products(layers: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
    """HetLoRA's weight of a client: sqrt(sum over layers of |B A|_F^2), from Gram matrices.

    Args:
        layers: the client's "A" (r, in) and "B" (out, r) of each layer.
    """
    squares = []
    for factors in layers.values():
        a, b = factors["A"].double(), factors["B"].double()
        squares.append(float(((b.T @ b) * (a @ a.T)).sum()))
    return math.sqrt(max(0.0, math.fsum(squares)))


def fedex(sent: SentLayer) -> CommonLayer:
    """A = sum p A_i and B = sum p B_i; what is missing of Delta goes to the frozen weight.

        Delta - gamma B A = gamma sum_i p_i (B_i - B) (A_i - A)

    with the same p in all three places. Written so, it is zero where clients are equal and loses
    no digits where they are nearly so.
    """
    a_nri, b_nor = sent.factors["A"].double(), sent.factors["B"].double()
    weights = sent.weights.view(-1, 1, 1)
    a, b = (weights * a_nri).sum(0), (weights * b_nor).sum(0)
    u = (sent.gamma * weights * (b_nor - b)).transpose(0, 1).flatten(1)
    v = (a_nri - a).flatten(0, 1)
    dtype = sent.factors["A"].dtype
    common = {"A": a.to(dtype), "B": b.to(dtype)}
    return CommonLayer(common, base_change=None if len(sent.clients) == 1 else (u, v))


def flora(sent: SentLayer) -> CommonLayer:
    """Delta goes to the frozen weight; the next round starts with a new A, drawn as PEFT does."""
    import torch

    a, b = sent.before["A"], sent.before["B"]
    bound = 1.0 / math.sqrt(a.shape[1])
    draw = torch.Generator().manual_seed(sent.seed)
    fresh = torch.empty(a.shape, dtype=a.dtype).uniform_(-bound, bound, generator=draw)
    common = {"A": fresh.to(a.device), "B": torch.zeros_like(b)}
    return CommonLayer(common, base_change=stacks(sent))
