import numpy as np
import pytest
import torch

from ultravox.data.collate import WindowSlots, collate_tokens, loss_mask, pad_frames
from ultravox.errors import DataError
from ultravox.tokens import IGNORE_INDEX

AUDIO, PAD, END = 99, 0, 7


def collate(rows, masks, counts, pad=PAD):
    ids = [f"clip-{i}" for i in range(len(rows))]
    arrays = [np.array(row) for row in rows], [np.array(mask, dtype=bool) for mask in masks]
    return collate_tokens(ids, *arrays, counts, audio_token_id=AUDIO, pad_token_id=pad)


def test_placeholders_become_as_many_as_the_clip_has_positions():
    batch = collate([[1, AUDIO, 2, 3, END], [1, AUDIO, 3, END]], [[0, 0, 0, 1, 1], [0, 0, 1, 1]], [[3], [1]])
    assert batch.input_ids.tolist() == [[1, AUDIO, AUDIO, AUDIO, 2, 3, END], [1, AUDIO, 3, END, PAD, PAD, PAD]]
    ignore = IGNORE_INDEX
    assert batch.labels.tolist() == [[ignore] * 5 + [3, END], [ignore, ignore, 3, END, ignore, ignore, ignore]]
    assert batch.mask.sum(1).tolist() == [7, 4]
    assert batch.num_tokens == 11


def test_two_clips_in_one_row_keep_their_order():
    batch = collate([[AUDIO, 1, AUDIO, 2]], [[0, 0, 0, 1]], [[2, 3]])
    assert batch.input_ids.tolist() == [[AUDIO, AUDIO, 1, AUDIO, AUDIO, AUDIO, 2]]


def test_the_end_is_trained_even_where_it_is_the_pad_token():
    batch = collate([[AUDIO, 3, END], [AUDIO, 3, 4, 5, END]], [[0, 1, 1], [0, 1, 1, 1, 1]], [[1], [1]], pad=END)
    assert batch.labels[0].tolist() == [IGNORE_INDEX, 3, END, IGNORE_INDEX, IGNORE_INDEX]


def test_counts_that_do_not_fit_name_the_row():
    with pytest.raises(DataError, match=r"3 audio clips, 2 <\|audio\|> placeholders in clip-0"):
        collate([[AUDIO, AUDIO, 3]], [[0, 0, 1]], [[1, 1, 1]])


def test_an_empty_answer_is_an_error_not_nan():
    with pytest.raises(DataError, match="nothing is supervised in clip-1"):
        collate([[AUDIO, 3], [AUDIO, 3]], [[0, 1], [0, 0]], [[1], [1]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("assistant_turns", [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]),
        ("response", [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
        ("after_audio", [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
        ("all_text", [1, 0, 1, 1, 1, 1, 0, 1, 1, 1]),
    ],
)
def test_loss_masks(kind, expected):
    # a dialogue: user (audio), assistant, user (audio), assistant
    input_ids = np.array([1, AUDIO, 2, 3, END, 1, AUDIO, 2, 4, END])
    supervised = np.array([0, 0, 0, 1, 1, 0, 0, 0, 1, 1], dtype=bool)
    assert loss_mask(input_ids, supervised, AUDIO, kind).astype(int).tolist() == expected


def test_frames_are_padded_with_zeros_in_float32():
    clips = [np.ones((3, 2), np.float16), np.full((5, 2), 2, np.float32)]
    frames, lengths = pad_frames(clips)
    assert frames.dtype == torch.float32
    assert lengths.tolist() == [3, 5]
    assert frames[0].tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert frames[1].eq(2).all()


def test_whispers_windows_stand_without_a_gap():
    slots = WindowSlots(full=1500, slot=1500)
    assert slots.lengths(3100) == [1500, 1500, 100]
    assert slots.lengths(1500) == [1500]
    rows = np.arange(3100)[:, None].astype(np.float32)
    pieces = slots.split(rows)
    assert [len(piece) for piece in pieces] == [1500, 1500, 100]
    assert pieces[1][0, 0] == 1500
    np.testing.assert_array_equal(slots.join(pieces), rows)


@pytest.mark.parametrize("lengths", [[1], [1499], [1500], [1499, 1], [1499, 1499], [1499, 1500], [1499, 1499, 7]])
def test_windows_are_found_again_where_the_last_may_be_longer(lengths):
    slots = WindowSlots(full=1499, slot=1500)
    pieces = [np.full((length, 2), index + 1, np.float16) for index, length in enumerate(lengths)]
    rows = slots.join(pieces)
    assert slots.lengths(len(rows)) == lengths
    for piece, found in zip(pieces, slots.split(rows), strict=True):
        np.testing.assert_array_equal(found, piece)
