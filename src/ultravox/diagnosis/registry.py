"""All checks, in the order in which they run. A new one is a `Check` in a module's CHECKS, and that module here."""

from ultravox.diagnosis import (
    batch_checks,
    independence,
    objective_checks,
    order_check,
    overfit_checks,
    start_checks,
    trained_checks,
    update_checks,
)
from ultravox.diagnosis.finding import Check

CHECKS: list[Check] = sorted(
    [
        check
        for module in (
            batch_checks,
            start_checks,
            update_checks,
            overfit_checks,
            independence,
            trained_checks,
            order_check,
            objective_checks,
        )
        for check in module.CHECKS
    ],
    key=lambda check: check.number,
)
