"""What a model can be asked to do with a row: the user's words and the answer of each task, as Jinja templates.

The recordings come before the words. `templates.py` fills in a row's columns.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One task. Its templates name columns of a row."""

    prompts: tuple[str, ...]
    """Phrasings of what the user writes; the first is the one that inference uses."""
    response: str
    """What the assistant answers."""
    optional: frozenset[str] = frozenset()
    """Columns that a source may lack; the templates ask whether they are there."""
    hears: bool = True
    """False: a row's recordings, where it has any, are not used."""
    dialogue: bool = False
    """A row may bring the whole dialogue in its `messages`."""


_TRANSCRIPTION = (
    "Transcribe",  # inference and the quickstart use this one: it stays as it is
    "Transcribe this.",
    "Transcribe the audio.",
    "Transcribe the recording above.",
    "Transcribe the speech in this clip.",
    "Please transcribe what you hear.",
    "Please write down what is said.",
    "Write down what is said.",
    "Write down exactly what the speaker says.",
    "Write out the words in this recording.",
    "Write this down for me.",
    "Type out what you just heard.",
    "Put this recording into writing.",
    "Turn this speech into text.",
    "Convert the audio to text.",
    "Give me a transcript.",
    "Give me the exact words of this recording.",
    "I need a transcript of this clip.",
    "Can you transcribe this for me?",
    "Could you write down what was said?",
    "What does the speaker say?",
    "What is said in this recording?",
    "What were the exact words?",
    "Repeat what was said, word for word.",
    "Copy down the speech, and nothing else.",
    "Take this down as dictation.",
)

_TRANSLATION = (
    "Translate{% if target_language %} to {{ target_language }}{% endif %}",
    "Translate this{% if target_language %} into {{ target_language }}{% endif %}.",
    "Please translate what you hear{% if target_language %} into {{ target_language }}{% endif %}.",
    "Translate the recording{% if target_language %} into {{ target_language }}{% endif %}.",
    "Write a translation{% if target_language %} in {{ target_language }}{% endif %}.",
    "Give me the translation of this speech{% if target_language %} in {{ target_language }}{% endif %}.",
    "Can you translate this{% if target_language %} to {{ target_language }}{% endif %} for me?",
    "What does this mean{% if target_language %} in {{ target_language }}{% endif %}?",
    "How would you say this{% if target_language %} in {{ target_language }}{% else %} in translation{% endif %}?",
    "Put what the speaker says{% if target_language %} into {{ target_language }}"
    "{% else %} into the other language{% endif %}.",
)

_ENDPOINTING = (
    "Has the speaker finished?",
    "Is the speaker done?",
    "Has the speaker said everything?",
    "Is this a whole sentence, or will more come? Answer Yes if it is whole, No if more will come.",
    "Did the speaker come to an end?",
    "Is it my turn to speak now?",
    "Should I answer now? Say No if the speaker is still talking.",
    "Is what was said complete?",
)

TASKS: dict[str, Task] = {
    "transcription": Task(_TRANSCRIPTION, "{{ text }}"),
    "translation": Task(_TRANSLATION, "{{ translation }}", optional=frozenset({"target_language"})),
    # what the language model itself wrote after the text; the audio alone stands for that text
    "continuation": Task(("",), "{{ answer }}"),
    "answer": Task(("",), "{{ answer }}"),
    "question_answering": Task(("{{ question }}",), "{{ answer }}"),
    "endpointing": Task(_ENDPOINTING, "{{ 'Yes' if complete | truth else 'No' }}"),
    "conversation": Task((), "", dialogue=True),
    "text": Task(("{{ prompt }}",), "{{ response }}", hears=False, dialogue=True),
}
"""Every task by its name in a configuration (`config.data.TaskName`)."""
