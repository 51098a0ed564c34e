"""Tells when a language model does not use its audio yet, and when it begins to."""

from collections.abc import Mapping

#: Token accuracy with the clip's own audio over that with another clip's: below the first it makes no difference …
NO_USE = 0.05
#: … and from the second on it plainly does. Between them nothing is said.
USE = 0.15


class PlateauNotice:
    """From the evaluations of one stage, a line when the plateau is seen and when it is left.

    Early in training a language model tells the next token from the text before it alone: token accuracy stands still,
    for thousands of steps where the projector starts from nothing, and then rises within a few hundred ("emergence":
    SLAM-ASR, Ma et al. 2024, arXiv 2402.08846). What tells this plateau from a low accuracy of another kind is that
    another clip's audio does as well.
    """

    def __init__(self) -> None:
        self._on_plateau: bool | None = None

    def look(self, metrics: Mapping[str, float]) -> str:
        """One line, or empty when nothing has changed."""
        own, swapped = metrics.get("kept_out_token_accuracy"), metrics.get("swapped_token_accuracy")
        if own is None or swapped is None:
            return ""
        figures = f"token accuracy {own:.1%} with the clips' own audio, {swapped:.1%} with other clips'"
        if own - swapped < NO_USE and self._on_plateau is not True:
            self._on_plateau = True
            return (
                f"{figures}: the model goes by the text alone yet. This plateau is usual before audio is used; if it "
                "lasts, train an `align` stage first, or for longer, or raise the projector's rate"
            )
        if own - swapped >= USE and self._on_plateau is True:
            self._on_plateau = False
            return f"{figures}: the model has left the plateau and uses its audio"
        return ""
