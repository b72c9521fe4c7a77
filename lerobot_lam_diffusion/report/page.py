"""Sections, pictures and the template that makes them a page."""

import base64
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lerobot_lam_diffusion.report.verdict import Verdict
from lerobot_lam_diffusion.utils.files import write_whole


@dataclass(frozen=True)
class Picture:
    """Args:
    data: PNG or JPEG.
    alt: what it shows, in words, for those who cannot see it.
    """

    data: bytes
    alt: str
    caption: str = ""

    @property
    def kind(self) -> str:
        return "png" if self.data.startswith(b"\x89PNG") else "jpeg"

    @property
    def uri(self) -> str:
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Group:
    """Pictures below one another (`plain`, `strip`: full width) or side by side (`grid`)."""

    pictures: list[Picture]
    title: str = ""
    look: str = "plain"


@dataclass
class Section:
    """A question and what answers it; `on_card` pictures of it go on a store's card."""

    title: str
    name: str
    texts: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)
    on_card: int = 0


def write_page(path: Path, title: str, verdict: Verdict, sections: list[Section]) -> None:
    """Write the page atomically."""
    environment = Environment(
        loader=PackageLoader("lerobot_lam_diffusion.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    text = environment.get_template("template.html.j2").render(
        title=title, verdict=verdict, sections=sections
    )
    write_whole(path, text)
