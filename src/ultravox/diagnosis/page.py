"""The page of ``ultravox diagnose --html``: one HTML file with the verdict and every check."""

from pathlib import Path

from markupsafe import Markup

from ultravox.diagnosis.finding import Diagnosis
from ultravox.evaluation.report import page_environment, page_style
from ultravox.files import atomic_write


def write_page(path: Path, diagnosis: Diagnosis) -> None:
    """Write the page; it opens without any other file."""
    source = Path(__file__).with_name("diagnosis.html.jinja").read_text(encoding="utf-8")
    content = page_environment().from_string(source).render(diagnosis=diagnosis, style=Markup(page_style()))
    atomic_write(path, content)
