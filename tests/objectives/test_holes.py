"""Holes for inpainting: rectangles of their shares, and a trained network that gains the input starts where it was."""

from dataclasses import replace

import pytest
import torch
from objectives.test_denoising import SHAPE, batch, objective, rng

from raphael.net.inputs import known_picture, widened
from raphael.objectives.holes import INSIDE_KNOWN, LARGEST, NOTHING_KNOWN, SMALLEST, _rectangles, known_masks


def test_a_rectangle_is_the_pixels_whose_middle_lies_in_it():
    u = rng(range(40)).uniform("u", (4,))
    found = _rectangles(u, 6, 9)
    for row, (tall, wide, down, across) in enumerate(u.tolist()):
        sides = [SMALLEST + (LARGEST - SMALLEST) * share for share in (tall, wide)]
        first = [(1 - side) * place for side, place in zip(sides, (down, across), strict=True)]
        for y in range(6):
            for x in range(9):
                inside = [low <= at < low + side for low, side, at in zip(first, sides, ((y + 0.5) / 6, (x + 0.5) / 9))]
                assert bool(found[row, 0, y, x]) == all(inside)


def test_nothing_one_rectangle_or_all_but_two_are_known_in_their_shares():
    known = known_masks(rng(range(4000)), 16, 16).flatten(1).mean(1)
    assert (known == 0).float().mean() == pytest.approx(NOTHING_KNOWN, abs=0.03)
    assert ((known > 0) & (known < 0.3)).float().mean() > INSIDE_KNOWN / 3
    assert (known < 1).all() and known.max() > 0.85


def test_a_samples_hole_is_its_own_whatever_stands_beside_it():
    whole = known_masks(rng(range(6)), 8, 8)
    assert torch.equal(whole, torch.cat([known_masks(rng(part), 8, 8) for part in (range(2), range(2, 6))]))
    assert not torch.equal(whole, known_masks(rng(range(6), seed=4), 8, 8))


def test_the_picture_shows_what_is_known_and_nothing_of_the_hole():
    x0, known = torch.randn(2, 4, 3, 3), torch.zeros(2, 1, 3, 3)
    known[0, :, :2] = 1
    picture = known_picture(x0, known)
    assert torch.equal(picture[:, :1], known) and not picture[1].any()
    assert torch.equal(picture[0, 1:, :2], x0[0, :, :2]) and not picture[0, 1:, 2].any()


def with_input(plain):
    """An objective whose network is the plain one's with the input of mask and picture."""
    wide = objective(unet={"inpainting": True, "picture_channels": SHAPE.latent_channels + 1})
    wide.unet.load_state_dict(widened(_fresh(wide.unet), plain.unet.state_dict()))
    return wide


def _fresh(network):
    torch.nn.init.zeros_(network.picture_in.weight)
    return network


def test_at_step_0_the_loss_and_all_gradients_are_those_of_the_model_that_it_begins_with():
    plain = objective()
    wide, losses = with_input(plain), {}
    for name, goal in (("plain", plain), ("wide", wide)):
        losses[name] = goal(batch(range(6)), rng(range(6)))
        losses[name]["loss"].backward()
    assert losses["plain"].keys() == losses["wide"].keys()
    assert all(torch.equal(losses["plain"][name], losses["wide"][name]) for name in losses["plain"])
    theirs = dict(plain.unet.named_parameters())
    for name, parameter in wide.unet.named_parameters():
        if name in theirs:
            assert torch.equal(parameter.grad, theirs[name].grad), name
    assert wide.unet.picture_in.weight.grad.abs().max() > 0


def test_steps_teach_the_new_columns_to_read_the_picture():
    """One batch with one noise, again and again: the network with the input ends below the one without."""
    ends = {}
    for name in ("plain", "wide"):
        goal = objective(caption_drop=0.0)
        goal = with_input(goal) if name == "wide" else goal
        adam = torch.optim.Adam(goal.unet.parameters(), 2e-3)
        for _ in range(30):
            loss = goal(batch(range(6)), rng(range(6)))["denoise"]
            adam.zero_grad()
            loss.backward()
            adam.step()
        ends[name] = loss.item()
    assert ends["wide"] < ends["plain"]


def test_the_held_out_loss_is_of_the_same_holes_every_time():
    wide = with_input(objective()).eval()
    torch.nn.init.normal_(wide.unet.picture_in.weight, std=0.1)
    place = torch.linspace(0.1, 0.9, 6)
    one, other = (wide.heldout(batch(range(6)), rng(range(6)), place) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, wide.heldout(batch(range(6)), rng(range(6), seed=4), place))


def test_an_inpainting_network_has_a_mask_and_a_picture_to_read():
    with pytest.raises(ValueError, match="picture_channels: got 4 with inpainting, expected 5"):
        replace(SHAPE, inpainting=True, picture_channels=4)
