"""Draws the scheme of the network, network-light.svg and network-dark.svg: `python docs/images/network.py`."""

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape


class Theme(NamedTuple):
    """Colours of a picture."""

    background: str
    text: str
    faint: str  # lines, and text of less weight
    locked: str
    trained: str
    kernels: dict[str, str]  # by letter


THEMES = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#59636e",
        "#eaeef2",
        "#ddf4ff",
        {"N": "#0969da", "A": "#8250df", "G": "#1a7f37", "Z": "#bc4c00"},
    ),
    "dark": Theme(
        "#0d1117",
        "#e6edf3",
        "#9198a1",
        "#21262d",
        "#0c2d6b",
        {"N": "#1f6feb", "A": "#8957e5", "G": "#238636", "Z": "#bd561d"},
    ),
}
LEGEND = {
    "N": ("group_norm_silu", "in each residual block and transformer"),
    "A": ("attention", "self- and cross-attention"),
    "G": ("geglu", "the transformers' feed-forward"),
    "Z": ("zero_conv_add", "zero convolution + addition, 13 exits"),
}
WIDTH, HEIGHT = 440, 664
BOX, GAP = (128, 58), 28  # of a block; between two columns
ENCODER, DECODER, CONTROL = (x * (BOX[0] + GAP) for x in range(3))  # left edges of the columns
TOP, STEP = 134, 84  # upper edge of the first level; from one level to the next
LEVELS = (("64 x 64, 320", "NAG"), ("32 x 32, 640", "NAG"), ("16 x 16, 1280", "NAG"), ("8 x 8, 1280", "N"))
MIDDLE = TOP + 4 * STEP


class Picture:
    """An SVG that grows by its shapes; coordinates in pixels of a phone's screen."""

    def __init__(self, theme: Theme):
        self.theme, self.parts = theme, []

    def text(self, x: float, y: float, text: str, size: int = 14, weight: str = "normal", **look: str) -> None:
        colour, anchor = look.get("colour", self.theme.text), look.get("anchor", "middle")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
            f' text-anchor="{anchor}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}"'
            f' stroke="{self.theme.faint}"/>'
        )

    def kernel(self, x: float, y: float, letter: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="{self.theme.kernels[letter]}"/>')
        self.text(x, y + 5, letter, 13, "bold", colour="#ffffff")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)  # lines are horizontal or vertical
        line = " ".join(f"{px:g},{py:g}" for px, py in points)
        wings = ((x - 7 * dx - 4 * side * dy, y - 7 * dy - 4 * side * dx) for side in (1, -1))
        head = " ".join(f"{px:g},{py:g}" for px, py in ((x, y), *wings))
        self.parts.append(f'<polyline points="{line}" fill="none" stroke="{self.theme.faint}" stroke-width="1.5"/>')
        self.parts.append(f'<polygon points="{head}" fill="{self.theme.faint}"/>')

    def block(self, x: float, y: float, title: str, kernels: str, fill: str, width: float = BOX[0]) -> None:
        """A level of the network: its size, and the kernels that compute it."""
        self.box(x, y, width, BOX[1], fill)
        self.text(x + width / 2, y + 20, title)
        for number, letter in enumerate(kernels):
            self.kernel(x + width / 2 + 26 * (number - (len(kernels) - 1) / 2), y + 40, letter)

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {WIDTH + 16} {HEIGHT}" role="img"'
            ' font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
            "<title>The locked U-Net and the ControlNet, and which kernel computes which part</title>"
            f'<rect x="-8" width="{WIDTH + 16}" height="{HEIGHT}" fill="{self.theme.background}"/>'
        )
        return "\n".join([head, *self.parts, "</svg>", ""])


def columns(picture: Picture) -> None:
    """The heads of the three columns and what goes in and out."""
    theme = picture.theme
    for x, name, state in (
        (ENCODER, "encoder", "locked"),
        (DECODER, "decoder", "locked"),
        (CONTROL, "ControlNet", "trainable copy"),
    ):
        centre = x + BOX[0] / 2
        picture.text(centre, 18, name, 15, "bold")
        picture.text(centre, 35, state, 13, colour=theme.faint)
    encoder, decoder, control = (x + BOX[0] / 2 for x in (ENCODER, DECODER, CONTROL))
    picture.text(encoder, 62, "noisy latent")
    picture.arrow((encoder, 68), (encoder, TOP))
    picture.arrow((encoder, 112), (control - 24, 112), (control - 24, TOP))
    picture.text(decoder, 62, "predicted noise")
    picture.arrow((decoder, TOP), (decoder, 68))
    picture.text(control + 16, 62, "hint, encoded")
    picture.arrow((control + 16, 68), (control + 16, TOP))


def levels(picture: Picture) -> None:
    """Four levels: skips from the encoder, zero convolutions from the ControlNet, both into the decoder."""
    theme = picture.theme
    for number, (size, kernels) in enumerate(LEVELS):
        y = TOP + number * STEP
        middle = y + BOX[1] / 2
        for x, fill in ((ENCODER, theme.locked), (DECODER, theme.locked), (CONTROL, theme.trained)):
            picture.block(x, y, size, kernels, fill)
        picture.arrow((ENCODER + BOX[0], middle), (DECODER, middle))
        picture.arrow((CONTROL, middle), (DECODER + BOX[0], middle))
        picture.kernel(CONTROL - GAP / 2 + 4, middle, "Z")
        for x in (ENCODER, CONTROL):
            picture.arrow((x + BOX[0] / 2, y + BOX[1]), (x + BOX[0] / 2, y + STEP))
        picture.arrow((DECODER + BOX[0] / 2, y + STEP), (DECODER + BOX[0] / 2, y + BOX[1]))


def draw(theme: Theme) -> str:
    """The SVG in the colours of a theme."""
    picture = Picture(theme)
    columns(picture)
    levels(picture)
    middle = MIDDLE + BOX[1] / 2
    picture.block(ENCODER, MIDDLE, "middle block", "NAG", theme.locked, 2 * BOX[0] + GAP)
    picture.block(CONTROL, MIDDLE, "middle block", "NAG", theme.trained)
    picture.arrow((CONTROL, middle), (DECODER + BOX[0], middle))
    picture.kernel(CONTROL - GAP / 2 + 4, middle, "Z")
    y = MIDDLE + BOX[1] + 28
    for number, (letter, (name, where)) in enumerate(LEGEND.items()):
        picture.kernel(12, y + 26 * number, letter)
        picture.text(30, y + 26 * number + 5, name, 14, "bold", anchor="start")
        picture.text(156, y + 26 * number + 5, where, 14, anchor="start", colour=theme.faint)
    return picture.svg()


def main(folder: Path = Path(__file__).parent) -> None:
    for name, theme in THEMES.items():
        (folder / f"network-{name}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
