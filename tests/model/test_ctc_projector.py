"""Projectors made of the language model's rows: plain formulas, runs, gradients; trained: tests/training."""

import itertools

import pytest
import torch

from ultravox.model.ctc_projector import BLANK, CtcProjector, compress
from ultravox.model.projector import SwigluProjector
from ultravox.objectives.alignment import CtcAlignment

WIDTH, HIDDEN, ROWS = 12, 10, 7


def make(compresses=False) -> tuple[CtcProjector, torch.Tensor]:
    torch.manual_seed(0)
    projector = CtcProjector(SwigluProjector(WIDTH, 16, HIDDEN, 2), HIDDEN, 20, compresses=compresses)
    projector.init_scale(1.0)
    rows = torch.randn(ROWS, HIDDEN)
    projector.choose_rows(torch.arange(3, 3 + ROWS), rows)
    return projector.eval(), rows


def padded(lengths):
    frames = torch.randn(len(lengths), max(lengths), WIDTH)
    for row, length in zip(frames, lengths, strict=True):
        row[length:] = 0
    return frames, torch.tensor(lengths)


def test_a_position_is_the_posterior_mean_of_rows():
    """Against the definition, one position after the other."""
    projector, rows = make()
    frames, lengths = padded([9, 4])
    with torch.no_grad():
        scored, base_lengths = projector.base(frames, lengths)
        made, token_lengths = projector(frames, lengths, rows)
    assert token_lengths.tolist() == base_lengths.tolist() == [5, 2]
    table = [projector.blank.detach(), *rows]
    for clip in range(2):
        for place in range(int(token_lengths[clip])):
            products = torch.stack([row @ scored[clip, place] for row in table])
            shares = torch.softmax(products * projector.log_scale.detach().exp(), dim=0)
            expected = sum(share * row for share, row in zip(shares, table, strict=True))
            torch.testing.assert_close(made[clip, place], expected, atol=1e-5, rtol=1e-4)


def test_the_scores_are_those_that_the_alignment_trains():
    projector, _ = make()
    embedding = torch.randn(20, HIDDEN)
    projector.choose_rows(torch.arange(3, 3 + ROWS), embedding[3 : 3 + ROWS])
    alignment = CtcAlignment(embedding, projector.token_ids, head=(projector.blank, projector.log_scale))
    frames, lengths = padded([40, 31])
    with torch.no_grad():
        scored, token_lengths = projector.base(frames, lengths)
        posterior = alignment.scores(scored).softmax(-1)
        expected = posterior @ torch.cat([projector.blank[None], alignment.rows])
        made, _ = projector(frames, lengths, embedding[3 : 3 + ROWS])
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
        # what greedy CTC decoding writes, position for position
        projector.compresses = True
        _, counts = projector(frames, lengths, embedding[3 : 3 + ROWS])
        assert counts.tolist() == [len(text) for text in alignment.decode(scored, token_lengths)]
    alignment.loss(projector.base(frames, lengths)[0], token_lengths, torch.tensor([1, 2, 3]), torch.tensor([2, 1]))[
        0
    ].backward()
    assert projector.blank.grad is not None
    assert projector.blank.grad.any()
    assert projector.log_scale.grad is not None
    assert projector.log_scale.grad.any()


def plain_compress(embeddings, best):
    """One clip, by the standard library."""
    runs = [(row, list(places)) for row, places in itertools.groupby(range(len(best)), key=lambda place: best[place])]
    spoken = [torch.stack([embeddings[place] for place in places]).mean(0) for row, places in runs if row != BLANK]
    return spoken or [embeddings.mean(0)]


@pytest.mark.parametrize("seed", range(5))
def test_runs_become_their_means_and_blanks_go(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [12, 1, 7, 12, 3]
    best = torch.randint(0, 3, (5, 12), generator=generator)
    best[4] = BLANK  # nothing but blanks: one position stays
    best[1, 1:] = 2  # padding says something, and must not
    embeddings = torch.randn(5, 12, HIDDEN, generator=generator)
    made, counts = compress(embeddings, best, torch.tensor(lengths))
    for clip, length in enumerate(lengths):
        expected = plain_compress(embeddings[clip, :length], best[clip, :length].tolist())
        assert int(counts[clip]) == len(expected)
        torch.testing.assert_close(made[clip, : len(expected)], torch.stack(expected))
    assert made.shape[1] == int(counts.max())


def test_golden_runs():
    """Blank, a, a, blank, a, b, b: a, a and b, as CTC reads it."""
    embeddings = torch.arange(7.0).view(1, 7, 1)
    made, counts = compress(embeddings, torch.tensor([[0, 1, 1, 0, 1, 2, 2]]), torch.tensor([7]))
    assert counts.tolist() == [3]
    assert made.flatten().tolist() == [1.5, 4.0, 5.5]


def test_gradients_reach_the_frames_through_runs_and_weights():
    projector, rows = make(compresses=True)
    frames, lengths = padded([9, 4])
    frames.requires_grad_(True)
    projector(frames, lengths, rows)[0].square().sum().backward()
    assert frames.grad is not None
    assert frames.grad.any()
    silent = [name for name, parameter in projector.named_parameters() if not parameter.grad.any()]
    assert silent == []


@pytest.mark.parametrize("compresses", [False, True])
def test_nothing_gives_nothing(compresses):
    projector, rows = make(compresses)
    output, lengths = projector(torch.zeros(0, 4, WIDTH), torch.zeros(0, dtype=torch.long), rows)
    assert output.shape == (0, 2, HIDDEN)
    assert len(lengths) == 0
