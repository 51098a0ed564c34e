"""Checks 1 and 2: a batch as a person would read it, and as the model counts it."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed, skipped
from ultravox.diagnosis.plain_forward import heard_batch
from ultravox.diagnosis.recordings import Hearing, hear_rows
from ultravox.diagnosis.workbench import Workbench, describe_error, needs_tuning
from ultravox.errors import UltravoxError
from ultravox.model.factory import end_token_ids
from ultravox.tokens import AUDIO_TOKEN, IGNORE_INDEX
from ultravox.training.batches import SpeechBatch

SHOWN = 3
LEAST_ANSWER = 4
"""Characters of an answer that would hardly stand in a prompt by chance."""
LEAKED = 0.5
"""Share of a source's answers that stand in their own prompts, beyond those that stand in others'."""
FEWEST_TO_LEAK = 3


@dataclass(slots=True)
class ReadRow:
    """One row as training sees it."""

    id: str
    source: int
    ids: np.ndarray
    supervised: np.ndarray
    shown: str
    """Its text, supervised stretches between ⟦ and ⟧."""
    prompt: str
    """What is not supervised before the first that is, without special tokens."""
    answer: str
    """What is supervised, without special tokens."""
    stretches: list[tuple[int, int]] = field(default_factory=list)
    """First and last + 1 of what is supervised."""


def check_batch(bench: Workbench) -> Finding:
    """Check 1. What is wrong first is told first; nothing after it can be trusted."""
    task = bench.tune
    batch = task.first_versions(bench.read)
    if not batch.ids:
        return skipped(f"none of {len(bench.read)} rows could be made: {batch.faults[:1]}")
    try:
        tokens = task.tokens(heard_batch(task, batch))
    except UltravoxError as error:
        return _not_made(error)
    supervised = [labels != IGNORE_INDEX for labels in tokens.labels.numpy()]
    rows = [
        read_row(bench, batch, index, ids[mask], chosen[mask])
        for index, (ids, chosen, mask) in enumerate(
            zip(tokens.input_ids.numpy(), supervised, tokens.mask.numpy(), strict=True)
        )
    ]
    lines = [f"{row.id}: {row.shown}" for row in _spread(rows)]
    hearing = hear_rows(bench, batch)
    wrong = find_supervision(bench, rows) or find_leak(rows) or find_hearing(hearing)
    count = sum(int(row.supervised.sum()) for row in rows)
    share = count / sum(len(row.ids) for row in rows)
    numbers: dict[str, Any] = {"rows": len(rows), "supervised_share": share, **hearing.to_json()}
    if wrong is not None:
        evidence, cause, action = wrong
        return failed(evidence, cause, action, lines, **numbers)
    return passed(
        f"{len(rows)} rows read: {share:.0%} of their positions are supervised, end tokens included; {hearing.said}",
        lines,
        **numbers,
    )


def _not_made(error: UltravoxError) -> Finding:
    nothing = "nothing is supervised" in str(error)
    return failed(
        describe_error(error),
        "a loss mask that leaves nothing, or empty answers" if nothing else "rows whose parts do not fit together",
        "look at tune.loss_mask and at the source's response template",
    )


def _spread(rows: list[ReadRow]) -> list[ReadRow]:
    """The first row of each source, and more of the first up to SHOWN."""
    firsts = {row.source: row for row in reversed(rows)}
    chosen = [firsts[source] for source in sorted(firsts)]
    return (chosen + [row for row in rows if row not in chosen])[: max(SHOWN, len(chosen))]


def read_row(bench: Workbench, batch: SpeechBatch, index: int, ids: np.ndarray, supervised: np.ndarray) -> ReadRow:
    """A row's tokens, without padding, as text."""
    tokenizer = bench.processor.tokenizer
    audio = ids == bench.tune.audio_token_id

    def text(chosen: np.ndarray, **options: Any) -> str:
        return tokenizer.decode(ids[chosen & ~audio], **options)

    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(np.int8)))
    stretches = [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
    shown = ""
    kinds = audio * 2 + supervised  # 0 prompt, 1 supervised, 2 audio, 3 audio that is supervised
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    for first, last in pairwise(cuts):
        piece = ids[first:last]
        said = f"[{AUDIO_TOKEN} × {last - first}]" if audio[first] else tokenizer.decode(piece)
        shown += f"⟦{said}⟧" if supervised[first] else said
    before = np.arange(len(ids)) < (stretches[0][0] if stretches else len(ids))
    return ReadRow(
        batch.ids[index],
        batch.sources[index],
        ids,
        supervised,
        shown.replace("\n", "⏎"),
        text(~supervised & before, skip_special_tokens=True).strip(),
        text(supervised, skip_special_tokens=True).strip(),
        stretches,
    )


Wrong = tuple[str, str, str]
"""Evidence, probable cause, next action."""


def find_supervision(bench: Workbench, rows: list[ReadRow]) -> Wrong | None:
    """Something, the end token, no placeholder, and nothing of the prompt."""
    task, tokenizer = bench.tune, bench.processor.tokenizer
    ends = np.array(end_token_ids(tokenizer, bench.model))
    answers_only = task.stage.tune.loss_mask in ("response", "assistant_turns")
    header = _answer_header(tokenizer) if answers_only else ""
    action = "look at tune.loss_mask, the chat template, and the text above: ⟦…⟧ is what is learnt"
    faults: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if not row.stretches:
            faults["nothing is supervised"].append(row.id)
            continue
        if (row.ids[row.supervised] == task.audio_token_id).any():
            faults["placeholders of audio are supervised"].append(row.id)
        last = [row.ids[stop - 1] in ends for _, stop in row.stretches]
        if not (all(last) if answers_only else np.isin(row.ids[row.supervised], ends).any()):
            faults["the end token is not supervised"].append(row.id)
        starts = (tokenizer.decode(row.ids[:start]).rstrip() for start, _ in row.stretches)
        if header and not all(before.endswith(header) for before in starts):
            faults["the prompt is supervised, or the answer's beginning is not"].append(row.id)
    causes = {
        "nothing is supervised": "a loss mask that leaves nothing: no loss, or one of 0",
        "placeholders of audio are supervised": "the model would learn to write placeholders",
        "the end token is not supervised": "the model will never learn to stop: its transcripts run on",
        "the prompt is supervised, or the answer's beginning is not": "the loss counts what the user says, which is "
        "easy to tell, and hides whether the answer is learnt",
    }
    for fault, ids in faults.items():
        return f"{fault} in {len(ids)} of {len(rows)} rows, such as {ids[0]}", causes[fault], action
    return None


def _answer_header(tokenizer: Any) -> str:
    """What the chat template writes between the user's turn and the answer; empty if that cannot be told."""
    turns = [{"role": "user", "content": "a"}]
    without = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return prompt[len(without) :].strip() if prompt.startswith(without) else ""


def find_leak(rows: list[ReadRow]) -> Wrong | None:
    """Whether a source's answers stand in their own prompts, and not in the others'."""
    for source in sorted({row.source for row in rows}):
        mine = [row for row in rows if row.source == source and len(row.answer) >= LEAST_ANSWER]
        heard = [row for row in mine if AUDIO_TOKEN in row.shown]
        if len({row.answer for row in heard}) < FEWEST_TO_LEAK:
            continue
        own = np.mean([_holds(row.prompt, row.answer) for row in heard])
        others = np.mean(
            [_holds(row.prompt, other.answer) for row in heard for other in heard if other.answer != row.answer]
        )
        if own >= LEAKED and own - others >= LEAKED:
            return (
                f"the answer stands in the prompt of {own:.0%} of {len(heard)} rows with audio, such as {heard[0].id}: "
                f"{heard[0].answer!r}",
                "the text has leaked into the prompt: the model copies it and never needs the audio",
                "take the answer's column out of the source's prompts",
            )
    return None


def _holds(prompt: str, answer: str) -> bool:
    return answer.casefold() in prompt.casefold()


def find_hearing(hearing: Hearing) -> Wrong | None:
    """Whether the audio of each row is its own, heard as the encoder was taught to hear."""
    if hearing.unlike:
        return (
            f"the features of {len(hearing.unlike)} of {hearing.num_rows} recordings are not those that the encoder's "
            f"own feature extractor gives ({hearing.unlike[0]}; they differ by {hearing.worst_features:.0%})",
            "another filterbank, another number or order of mel bins, or another normalisation than the encoder's",
            "use the extractor that belongs to the encoder's folder, and clear the feature cache",
        )
    if hearing.swapped:
        name, other = hearing.swapped[0]
        whose = f": it is that of {other}" if other else ""
        return (
            f"the audio of {len(hearing.swapped)} of {hearing.num_rows} rows is not their recording's, such as "
            f"{name}{whose}",
            "audio and text come from different rows, or the feature cache holds what another recording gave",
            "look at how rows and recordings are joined; clear the feature cache (ultravox data cache clear)",
        )
    return None


def check_counts(bench: Workbench) -> Finding:
    """Check 2: of a batch of the plan, each row's placeholders, positions and the plan's own count."""
    task = bench.tune
    batch = task.batch()
    try:
        tokens = task.tokens(heard_batch(task, batch))
    except UltravoxError as error:
        return _not_made(error)
    placeholders = (tokens.input_ids == task.audio_token_id).sum(1).tolist()
    windows: list[int] = []
    if len(batch.lengths):
        with torch.no_grad():
            windows = task.audio_embeddings(batch, augmented=False)[1].tolist()
    frames, start = [], 0
    for count in batch.num_windows:
        frames.append(sum(windows[start : start + count]))
        start += count
    odd = [(name, have, want) for name, have, want in zip(batch.ids, placeholders, frames, strict=True) if have != want]
    total = sum(placeholders)
    if odd or start != len(windows):
        name, have, want = odd[0] if odd else ("no row", start, len(windows))
        return failed(
            f"{len(odd)} of {len(batch.ids)} rows: {name} has {have} placeholders, and the projector gives {want}",
            "the collator and the model count positions by different rules: stack_factor, rounding of the last stack, "
            "or the encoder's stride",
            "let both call ultravox.audio.lengths",
            rows=len(batch.ids),
            odd=[list(entry) for entry in odd],
        )
    return passed(
        f"{total} placeholders are {total} projector frames, row by row, in a batch of {len(batch.ids)} rows",
        rows=len(batch.ids),
        placeholders=total,
    )


CHECKS = [
    Check(
        1,
        "a batch, read",
        "FAIL: nothing supervised, end token unsupervised, prompt supervised, answer in the prompt, another row's "
        "audio, other features than the encoder's",
        Blame.DATA,
        check_batch,
        lambda bench: needs_tuning(bench) or ("" if bench.pool else "there is no example"),
    ),
    Check(2, "placeholders = frames", "exact, each row", Blame.DATA, check_counts, needs_tuning),
]
