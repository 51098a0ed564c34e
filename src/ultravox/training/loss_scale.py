"""Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2), for gradients in float16.

The loss is multiplied so that small gradients do not vanish, by as much as none overflows: an infinite gradient lets
the step be left out and the scale be halved, and a long time without one doubles it. The numbers are those of
`torch.amp.GradScaler` but for the first: losses are sums over a batch here, of some thousand times the usual mean.
"""

FIRST_SCALE = 16.0
GROWTH_INTERVAL = 2000
LEAST_SCALE = 2.0**-14


def next_scale(scale: float, steps_at_scale: int, *, overflowed: bool) -> tuple[float, int]:
    """The scale of the next step, and for how many steps it has been that.

    Args:
        scale: of the step that is done.
        steps_at_scale: taken at it before that step.
        overflowed: whether the step's gradient was not finite, though its loss was.
    """
    if overflowed:
        return max(LEAST_SCALE, scale / 2), 0
    if steps_at_scale + 1 >= GROWTH_INTERVAL:
        return scale * 2, 0
    return scale, steps_at_scale + 1
