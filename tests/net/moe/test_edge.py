import math

import torch

from raphael.net.moe.edge import EdgeHead, focal_loss


def test_focal_loss_is_its_formula_on_hard_targets():
    for logit, target in [(0.3, 1.0), (0.3, 0.0), (-2.0, 1.0), (4.0, 0.0)]:
        p = 1 / (1 + math.exp(-logit))
        p_t, alpha_t = (p, 0.25) if target else (1 - p, 0.75)
        expected = -alpha_t * (1 - p_t) ** 2 * math.log(p_t)
        got = focal_loss(torch.tensor(logit), torch.tensor(target), alpha=0.25, gamma=2.0)
        assert math.isclose(got.item(), expected, rel_tol=1e-5)


def test_focal_loss_without_focus_is_half_the_binary_cross_entropy():
    logits, target = torch.randn(50), torch.rand(50)
    peer = 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, alpha=0.5, gamma=0.0), peer)


def test_focal_loss_stays_finite_at_extreme_logits():
    loss = focal_loss(torch.tensor([500.0, -500.0]), torch.tensor([0.0, 1.0]), 0.5, 2.0)
    assert loss.isfinite().all()


def test_the_head_sees_five_pixels_far_and_keeps_them_in_place():
    torch.manual_seed(0)
    head = EdgeHead(context_length=3, channels=4, num_layers=5)
    attention = torch.zeros(1, 16 * 20, 3)
    moved = attention.clone()
    moved[0, 8 * 20 + 9, 1] = 1.0  # pixel (8, 9) of a 16 x 20 map
    rows, columns = (head(moved, 16, 20) - head(attention, 16, 20))[0, 0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 13, 4, 14)
