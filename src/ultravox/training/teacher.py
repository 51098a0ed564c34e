"""The teacher of a distillation: the language model without its adapters, which reads what the student hears.

What it says at a position is its decoder's last state, from which the frozen output layer makes the logits. A state is
a hundredth of the logits' size, so states of many texts are kept, and the logits made of them are exact.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultravox.data.collate import LossMask, loss_mask
from ultravox.data.examples import TokenisedExample
from ultravox.model.adapters import without_adapters


class Teacher:
    """The states of a language model's own, by dialogue.

    Each dialogue is read by itself, never in a batch: its states are the same bits in whatever batch it comes and
    whether they were kept, so that a run that is resumed repeats them.
    """

    def __init__(self, model: Any, kind: LossMask, max_bytes: int) -> None:
        """Args:
        model: the student, an `UltravoxModel`.
        kind: where the student's loss counts.
        max_bytes: of the states that are kept, the least recently used of which go.
        """
        self.model, self.kind, self.max_bytes = model, kind, max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._num_bytes = 0
        self.num_passes = 0
        """How many dialogues have been read."""

    def targets(self, dialogue: TokenisedExample) -> np.ndarray:
        """The tokens that it is asked about, in their order: those that are supervised, [position]."""
        return dialogue.input_ids[self._mask(dialogue)]

    def hidden(self, dialogues: Sequence[TokenisedExample]) -> Tensor:
        """States at the positions whose next token is supervised, dialogue after dialogue, [position, hidden]."""
        return torch.cat([self._hidden(dialogue) for dialogue in dialogues])

    def logits(self, hidden: Tensor) -> Tensor:
        """What the teacher says, [position, vocabulary]."""
        with torch.no_grad(), without_adapters(self.model.language_model):
            return self.model.logits_of(hidden)

    def _mask(self, dialogue: TokenisedExample) -> np.ndarray:
        mask = loss_mask(dialogue.input_ids, dialogue.supervised, -1, self.kind)
        mask[:1] = False  # nothing stands before the first token to say it
        return mask

    def _hidden(self, dialogue: TokenisedExample) -> Tensor:
        key = dialogue.input_ids.tobytes() + dialogue.supervised.tobytes()
        found = self._kept.get(key)
        if found is None:
            found = self._read(dialogue)
            self._keep(key, found)
        else:
            self._kept.move_to_end(key)
        return found

    def _keep(self, key: bytes, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        if size > self.max_bytes:
            return
        self._kept[key] = states
        self._num_bytes += size
        while self._num_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.numel() * oldest.element_size()

    @torch.no_grad()
    def _read(self, dialogue: TokenisedExample) -> Tensor:
        self.num_passes += 1
        places = torch.from_numpy(np.flatnonzero(self._mask(dialogue)) - 1)
        ids = torch.from_numpy(dialogue.input_ids[: int(places[-1]) + 1])[None].to(self.model.device)
        language_model = self.model.language_model
        was_training = language_model.training
        language_model.eval()  # no dropout
        try:
            with without_adapters(language_model):
                embedded = self.model.get_input_embeddings()(ids)
                states = self.model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
        finally:
            language_model.train(was_training)
        return states[places.to(states.device)].clone()
