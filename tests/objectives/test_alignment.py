"""CTC alignment against PyTorch's own CTC clip by clip, the matching term by its formula, decoding by hand."""

import pytest
import torch
import torch.nn.functional as F

from ultravox.errors import DataError
from ultravox.objectives.alignment import CtcAlignment

TOKENS = torch.tensor([3, 5, 8, 11])
TARGETS = ([3, 5], [8, 8, 11], [5])
LENGTHS = torch.tensor([4, 7, 5])


def alignment(match_weight: float = 0.0) -> CtcAlignment:
    torch.manual_seed(0)
    return CtcAlignment(torch.randn(20, 16), TOKENS, match_weight)


def batch(objective: CtcAlignment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings [clip, token, hidden], targets in one row, and how many each clip has."""
    embeddings = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.cat([objective.targets(torch.tensor(clip)) for clip in TARGETS])
    return embeddings, targets, torch.tensor([len(clip) for clip in TARGETS])


def test_ctc_is_the_sum_over_single_clips_and_padding_changes_nothing():
    objective = alignment()
    embeddings, targets, counts = batch(objective)
    total, ctc, count = objective.loss(embeddings, LENGTHS, targets, counts)
    table = torch.cat([objective.blank[None], objective.rows])
    expected = torch.tensor(0.0)
    for clip, length, wanted in zip(embeddings, LENGTHS.tolist(), targets.split(counts.tolist()), strict=True):
        log_probs = F.log_softmax(clip[:length] @ table.T * objective.log_scale.exp(), dim=-1)
        expected = expected + F.ctc_loss(log_probs, wanted, torch.tensor(length), torch.tensor(len(wanted)), 0, "sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ctc, expected.detach())
    assert int(count) == 6
    embeddings[0, 4:] = 1e3
    torch.testing.assert_close(objective.loss(embeddings, LENGTHS, targets, counts)[0], expected)


def test_matching_is_no_distance_at_an_embedding_row():
    """Where every position is surely one row, that row is what it is pulled to."""
    objective = alignment(match_weight=2.0)
    with torch.no_grad():
        objective.log_scale += 5  # the posterior is then certain
    row = objective.rows[2].expand(1, 4, -1)
    target, lengths, counts = objective.targets(torch.tensor([8])), torch.tensor([4]), torch.tensor([1])
    total, ctc, _ = objective.loss(row, lengths, target, counts)
    torch.testing.assert_close(total.detach(), ctc)
    far, ctc, count = objective.loss(row * 1.5, lengths, target, counts)
    distance = (0.5 * objective.rows[2]).square().mean() / objective.variance
    torch.testing.assert_close((far - ctc).detach(), 2.0 * distance * count)


def test_the_gradient_reaches_embeddings_blank_and_scale():
    objective = alignment(match_weight=0.5)
    embeddings, targets, counts = batch(objective)
    embeddings.requires_grad_()
    objective.loss(embeddings, LENGTHS, targets, counts)[0].backward()
    assert embeddings.grad[0, :4].abs().min() > 0
    assert embeddings.grad[0, 4:].abs().max() == 0, "padding"
    assert objective.blank.grad.abs().sum() > 0
    assert objective.log_scale.grad != 0


def test_decoding_merges_repeats_and_drops_blanks():
    objective = alignment()
    table = torch.cat([objective.blank[None].detach(), objective.rows])
    table = 10 * F.normalize(table, dim=-1)
    with torch.no_grad():
        objective.blank.copy_(table[0])
        objective.rows.copy_(table[1:])
    positions = table[torch.tensor([[1, 1, 0, 1, 3, 3, 4], [0, 2, 2, 0, 4, 4, 4]])]
    assert objective.decode(positions, torch.tensor([7, 4])) == [[3, 3, 8, 11], [5]]


def test_a_token_without_a_row_is_named():
    with pytest.raises(DataError, match=r"transcript tokens \[4\] are not among the alignment's 4 tokens"):
        alignment().targets(torch.tensor([3, 4]))
