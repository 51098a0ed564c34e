"""Makes the model known to transformers' Auto classes, and so to programs that load it through them.

vLLM calls `register` through the entry point ``vllm.general_plugins``; no remote code is then needed.
"""


def register() -> None:
    """Register the configuration, the model and the processor; each file does it when it is imported."""
    import ultravox.model.modeling
    import ultravox.model.processing  # noqa: F401


register()
