"""The plan `covered` in training: each expert on the pixels that need it, gradients written once, where they stay.

    out(p) = sum_k [ u_k(p) e_k(h_p) + v_k(p) e_k(0) ],      e_k(h) = W2_k act(W1_k h + b1_k) + b2_k

Written as one autograd function, since the weights' gradients weigh as much as the products where pixels are few: at
width 1280, 256 pixels and six experts they are 315 MB, and autograd would write them expert by expert, copy them into a
stack, write the term of e_k(0) as another stack and add the two. Here e_k(0) is one more row of its expert's rows, and
each product lands in its place of the stack. Between forward and backward only W1 h + b1 is kept of the hidden layer,
the activation is computed again: half the memory.

Letters of the shape suffixes: R rows (pixels of all samples), K experts, D width, F hidden width, N rows of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raphael.net.layers import activate


@torch.compiler.disable  # counts of rows are data: nothing to trace
def covered_sum(h_RD: Tensor, inside_RK: Tensor, outside_RK: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """sum_k inside_k(p) e_k(h_p) + outside_k(p) e_k(0), shape (R, D), in the type autocast computes products in.

    weights: w1 (K, F, D), b1 (K, F), w2 (K, D, F), b2 (K, D); F of w1 and b1 doubled with geglu. An expert on no row
    gets the gradient of e_k(0) alone, which is zero where outside_k is.
    """
    kind = h_RD.device.type
    autocast = torch.is_autocast_enabled(kind) and h_RD.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else h_RD.dtype
    with torch.autocast(kind, enabled=False):
        return _CoveredSum.apply(dtype, h_RD, inside_RK, outside_RK, *weights)


class _CoveredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, h_RD: Tensor, inside_RK: Tensor, outside_RK: Tensor, *weights: Tensor):
        w1, b1, w2, b2 = (weight.to(dtype) for weight in weights)
        h_RD, inside_RK, outside_RK = (tensor.to(dtype) for tensor in (h_RD, inside_RK, outside_RK))
        out_RD, at_zero, kept = torch.zeros_like(h_RD), [], []
        for k, needed in enumerate((inside_RK != 0).T):
            rows_N = needed.nonzero().squeeze(1)
            hidden = h_RD.new_empty(len(rows_N) + 1, w1.shape[1])
            torch.addmm(b1[k], h_RD[rows_N], w1[k].T, out=hidden[:-1])
            hidden[-1] = b1[k]  # W1 0 + b1
            value = F.linear(activate(hidden, w2.shape[2]), w2[k], b2[k])  # (N + 1, D)
            out_RD.index_add_(0, rows_N, value[:-1] * inside_RK[rows_N, k, None])
            at_zero.append(value[-1])
            kept += [rows_N, hidden, value[:-1]]
        at_zero_KD = torch.stack(at_zero)
        ctx.save_for_backward(h_RD, inside_RK, outside_RK, at_zero_KD, w1, w2, *kept)
        ctx.types = [tensor.dtype for tensor in weights]
        # 0 * h is 0, but NaN where h is NaN or infinite: as in the fused plan, no pixel hides it by being uncovered
        return out_RD.addmm_(outside_RK, at_zero_KD).add_((0 * h_RD).sum(1, keepdim=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor):
        h_RD, inside_RK, outside_RK, at_zero_KD, w1, w2, *kept = ctx.saved_tensors
        _, for_h, for_inside, for_outside, *for_weights = ctx.needs_input_grad
        grad_RD = grad_RD.to(h_RD.dtype)
        grad_h = torch.zeros_like(h_RD) if for_h else None
        grad_inside = torch.zeros_like(inside_RK) if for_inside else None
        shapes = (w1.shape, w1.shape[:2], w2.shape, w2.shape[:2])
        grads = [
            torch.empty(shape, dtype=dtype, device=h_RD.device) if needed else None
            for shape, dtype, needed in zip(shapes, ctx.types, for_weights, strict=True)
        ]
        zero_KD = outside_RK.T @ grad_RD  # what reaches e_k(0)
        for k in range(len(w1)):
            rows_N, hidden, value = kept[3 * k : 3 * k + 3]
            grad_N = grad_RD[rows_N]
            if grad_inside is not None:
                grad_inside[rows_N, k] = (grad_N * value).sum(1)
            below = torch.cat([grad_N * inside_RK[rows_N, k, None], zero_KD[k, None]])  # (N + 1, D)
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                active = activate(hidden, w2.shape[2])
            (before,) = torch.autograd.grad(active, hidden, below @ w2[k])  # (N + 1, F)
            _write(grads[2], k, below.T, active.detach())
            _write(grads[0], k, before[:-1].T, h_RD[rows_N])
            for grad, rows in ((grads[1], before), (grads[3], below)):
                if grad is not None:
                    grad[k] = rows.sum(0)
            if grad_h is not None:
                grad_h.index_add_(0, rows_N, before[:-1] @ w1[k])
        grad_outside = grad_RD @ at_zero_KD.T if for_outside else None
        return None, grad_h, grad_inside, grad_outside, *grads


def _write(stack: Tensor | None, k: int, left: Tensor, right: Tensor) -> None:
    """stack[k] = left @ right, without a copy where the types agree."""
    if stack is None:
        return
    if stack.dtype == left.dtype:
        torch.mm(left, right, out=stack[k])
    else:
        stack[k] = left @ right
