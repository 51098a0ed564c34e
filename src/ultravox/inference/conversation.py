"""Several turns, audio in any of them; what the model has read stays in its key-value cache."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from ultravox.data.prompts import Message, render_prompt, user_message
from ultravox.inference.generate import Decoding, generate_tokens, stream_text
from ultravox.model.modeling import UltravoxModel
from ultravox.model.processing import UltravoxProcessor


class Conversation:
    """A dialogue with one model. Each turn computes its own tokens only.

    Args:
        system: a system message to begin with.
        decoding: how answers are chosen.
    """

    def __init__(
        self,
        model: UltravoxModel,
        processor: UltravoxProcessor,
        *,
        system: str | None = None,
        decoding: Decoding | None = None,
    ):
        self.model, self.processor, self.system = model, processor, system
        self.decoding = decoding or Decoding()
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._waveforms: list[np.ndarray] = []
        self._forget_cache()

    def _forget_cache(self) -> None:
        self._cache = DynamicCache(config=self.model.config.text_config)
        self._cached_text = ""  # the rendered dialogue whose positions the cache holds
        self._cached_mask = torch.ones(1, 0, dtype=torch.long, device=self.model.device)  # which of them are looked at

    @property
    def num_cached(self) -> int:
        """Positions in the cache."""
        return self._cache.get_seq_length()

    def say(self, text: str = "", waveforms: Sequence[np.ndarray] = ()) -> Iterator[str]:
        """Take a user's turn; returns the pieces of the answer as they come.

        A turn whose answer is cut short (the iterator is closed, or Ctrl-C) stays in the dialogue with what was said.

        Args:
            text: what the user writes, after the audio.
            waveforms: what the user says, each [sample] at 16 kHz.

        Raises:
            DataError: more ``<|audio|>`` in `text` than waveforms; the dialogue is then as it was.
        """
        messages = [*self.messages, user_message(text, len(waveforms))]
        prompt = render_prompt(self.processor.tokenizer, messages)
        continues = bool(self._cached_text) and prompt.startswith(self._cached_text)
        new_text = prompt[len(self._cached_text) :] if continues else prompt
        clips = list(waveforms) if continues else [*self._waveforms, *waveforms]
        batch = self.processor(text=new_text, audio=clips)
        if not continues:  # the first turn, or a template that rewrites earlier ones
            self._forget_cache()
        return self._answer(messages, [*self._waveforms, *waveforms], prompt, batch)

    def _answer(self, messages: list[Message], waveforms: list[np.ndarray], prompt: str, batch) -> Iterator[str]:
        with torch.no_grad():
            embeddings, mask = self.model.hear_prompt(**batch)
        cache, tokens = self._cache, []
        mask = torch.cat([self._cached_mask, mask], dim=1)
        self._cached_text = ""  # until the cache is known to be whole again
        is_whole = True

        def record() -> Iterator[int]:
            for step in generate_tokens(self.model, embeddings, mask, self.decoding, cache):
                tokens.append(step[0][1])
                yield tokens[-1]

        try:
            yield from stream_text(self.processor.tokenizer, record())
        except GeneratorExit:  # closed by the caller, between two tokens
            raise
        except BaseException:  # Ctrl-C inside a pass: some layers may hold the last token already, others not
            is_whole = False
            raise
        finally:
            if tokens:
                decode = self.processor.tokenizer.decode
                answer = decode(tokens, skip_special_tokens=True)
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                self._waveforms = waveforms
                if is_whole:
                    self._cached_mask = F.pad(mask, (0, self.num_cached - mask.shape[1]), value=1)
                    read = decode(tokens[:-1], skip_special_tokens=True)  # the last token is not in the cache
                    self._cached_text = prompt + read
            if not is_whole:
                self._forget_cache()  # the next turn reads the dialogue anew
