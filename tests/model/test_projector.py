"""The projector's arithmetic, written out once more by hand."""

import pytest
import torch

from ultravox.model.downsample import stack_frames
from ultravox.model.projector import SwigluProjector, swiglu


def test_stacking_keeps_the_tail():
    frames = torch.arange(14.0).reshape(1, 7, 2)
    stacked = stack_frames(frames, 3)
    assert stacked.shape == (1, 3, 6)
    assert stacked.flatten().tolist() == [*range(14), 0, 0, 0, 0]


def test_first_half_times_silu_of_the_second():
    x = torch.tensor([[2.0, 3.0, 1.0, -1.0]])
    expected = torch.tensor([[2 * 1 / (1 + torch.e**-1), 3 * -1 / (1 + torch.e)]])
    torch.testing.assert_close(swiglu(x), expected)


def rms_norm(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


@pytest.mark.parametrize("ln_mid", [True, False])
def test_arithmetic_by_hand(ln_mid):
    torch.manual_seed(0)
    projector = SwigluProjector(6, 16, 10, stack_factor=4, ln_mid=ln_mid)
    frames = torch.randn(2, 7, 6)
    frames[1, 5:] = 0
    output, lengths = projector(frames, torch.tensor([7, 5]))
    assert lengths.tolist() == [2, 2]
    padded = torch.cat([frames, torch.zeros(2, 1, 6)], 1).reshape(2, 2, 24)
    hidden = rms_norm(padded, projector.ln_pre.weight) @ projector.linear_1.weight.T
    hidden = hidden[..., :8] * torch.nn.functional.silu(hidden[..., 8:])
    if ln_mid:
        hidden = rms_norm(hidden, projector.ln_mid.weight)
    expected = hidden @ projector.linear_2.weight.T
    if not ln_mid:
        expected = rms_norm(expected, projector.ln_post.weight)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    names = {"ln_pre.weight", "linear_1.weight", "linear_2.weight", "ln_mid.weight" if ln_mid else "ln_post.weight"}
    assert set(projector.state_dict()) == names
    assert (projector.ln_pre.weight == 0.4).all()


@pytest.mark.parametrize("ln_mid", [True, False])
def test_output_scale(ln_mid):
    torch.manual_seed(0)
    projector = SwigluProjector(32, 512, 256, stack_factor=5, ln_mid=ln_mid)
    projector.init_scale(0.13)
    output, _ = projector(3 * torch.randn(4, 100, 32), torch.full((4,), 100))
    assert float(output.detach().square().mean().sqrt()) == pytest.approx(0.13, rel=0.05)


@pytest.mark.parametrize(("clips", "frames"), [(0, 4), (2, 0)])
def test_nothing_gives_nothing(clips, frames):
    projector = SwigluProjector(8, 16, 12, 2)
    output, lengths = projector(torch.zeros(clips, frames, 8), torch.zeros(clips, dtype=torch.long))
    assert output.shape == (clips, frames // 2, 12)
    assert lengths.tolist() == [0] * clips
