"""Whether an evaluation is whole, and where its results go: those of a part never replace those of the whole."""

from pathlib import Path

from ultravox.evaluation.checkpoint import Checkpoint


def parts_left_out(
    checkpoint: Checkpoint,
    *,
    clips: tuple[int, int],
    questions: tuple[int, int],
    question_source: tuple[str | None, str],
    fast: bool,
) -> list[str]:
    """What an evaluation leaves out of what the run's config asks for, in words; empty when it is whole.

    Args:
        clips, questions: how many are used, of how many there are.
        question_source: dataset and split of the questions; None for no questions.
    """
    named = checkpoint.evaluation.get("question_source")
    missing = ["the bounds (--fast)"] if fast else []
    if clips[0] < clips[1]:
        missing.append(f"{clips[1] - clips[0]} of {clips[1]} clips")
    if questions[0] < questions[1]:
        missing.append(f"{questions[1] - questions[0]} of {questions[1]} spoken questions")
    if named and question_source != (named, checkpoint.evaluation.get("question_split", "heldout")):
        missing.append(f"the spoken questions of {named}")
    return missing


def default_output(checkpoint: Checkpoint, source: str, split: str, *, is_partial: bool = False) -> Path:
    """Where results go: into the run itself for all the data that its config names, else into a folder of their own."""
    name = f"{Path(source).name.removesuffix('.jsonl').removesuffix('.json')}-{split}{'-partial' if is_partial else ''}"
    if checkpoint.run is None:
        return Path(f"evaluation-{checkpoint.model.absolute().name}-{name}")
    own = (checkpoint.evaluation.get("source", source), checkpoint.evaluation.get("split", split))
    return checkpoint.run if own == (source, split) and not is_partial else checkpoint.run / "evaluations" / name
