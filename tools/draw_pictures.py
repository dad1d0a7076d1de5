"""Draws the pictures of docs/how-it-works.md: python -m tools.draw_pictures docs/images

They take light or dark colours from the page that holds them (Furo's data-theme), or from the
reader's system if they are shown alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

LIGHT = {
    "ink": "#1d2433",
    "soft": "#5b6478",
    "line": "#9aa3b5",
    "paper": "#f4f6fa",
    "a": "#9cc4f5",
    "b": "#f7c98b",
    "c": "#a9dcb4",
    "d": "#e3b3e8",
}
DARK = {
    "ink": "#e6e9f0",
    "soft": "#a7b0c2",
    "line": "#667086",
    "paper": "#20242e",
    "a": "#2f5f99",
    "b": "#8a5a1c",
    "c": "#2f7040",
    "d": "#74407b",
}


def _style(selector: str, colours: dict[str, str]) -> str:
    return f"{selector}{{{''.join(f'--{name}:{value};' for name, value in colours.items())}}}"


STYLE = "".join(
    [
        _style("svg.drawn", LIGHT),
        f"@media(prefers-color-scheme:dark){{{_style('svg.drawn', DARK)}}}",
        _style('body[data-theme="light"] svg.drawn', LIGHT),
        _style('body[data-theme="dark"] svg.drawn', DARK),
        "svg.drawn{font-family:system-ui,sans-serif;font-size:14px}",
        ".drawn text{fill:var(--ink)}.drawn .soft{fill:var(--soft)}",
        ".drawn .mono{font-family:ui-monospace,monospace;font-size:13px}",
        ".drawn .big{font-size:15px;font-weight:600}",
        ".drawn path{fill:none;stroke:var(--soft);stroke-width:1.5}.drawn .head{fill:var(--soft)}",
        ".drawn rect{stroke:var(--line);fill:var(--paper)}",
        *(f".drawn .{name}{{fill:var(--{name})}}" for name in "abcd"),
    ]
)


class Picture:
    """An SVG to which parts are added; positions are in pixels, with y downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        kind: str = "",
        label: str = "",
        style: str = "",
    ) -> None:
        """Adds a rectangle that is coloured by its kind and has a label in its middle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2" class="{kind}"/>'
        )
        if label:
            self.text(x + w / 2, y + h / 2 + 5, label, style, "middle")

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """Adds words on one line."""
        at = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.parts.append(f'<text {at} class="{style}">{escape(words)}</text>')

    def line(self, *points: tuple[float, float], dashed: bool = False, arrow: bool = False) -> None:
        """Adds a line through points, with a head at its end if it is an arrow."""
        way = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        extra = (' stroke-dasharray="4 4"' if dashed else "") + (
            ' marker-end="url(#head)"' if arrow else ""
        )
        self.parts.append(f'<path d="{way}"{extra}/>')

    def svg(self) -> str:
        """Returns the whole file."""
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path class="head" stroke="none" '
            'd="M0 0L8 4L0 8Z"/></marker>'
        )
        body = "\n".join(self.parts)
        return (
            f'<svg class="drawn" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}"><style>{STYLE}</style><defs>{head}</defs>\n'
            f"{body}\n</svg>\n"
        )


GATES = (("i", "a"), ("f", "b"), ("g", "c"), ("o", "d"))


def packed_panel() -> Picture:
    """Draws a weight as torch stores it, a panel of it, and a tile that reads the panel."""
    p = Picture(860, 500)
    p.text(20, 26, "weight_hh as torch stores it", "big")
    p.text(20, 46, "[4H, H]: one row for each gate and unit", "soft")
    for g, (gate, kind) in enumerate(GATES):
        y = 62 + g * 92
        p.box(48, y, 190, 86)
        p.box(48, y + 26, 190, 24, kind)
        p.text(34, y + 48, gate, "mono", "middle")
    p.text(143, 450, "K = H values of h", "soft", "middle")
    p.text(143, 470, "coloured: 16 units of each gate", "soft", "middle")

    p.line((250, 236), (318, 236), arrow=True)
    p.text(284, 226, "pack", "soft", "middle")

    p.text(335, 26, "a panel: the gates of 16 units side by side", "big")
    p.text(335, 46, "[K][4 gates][16 units], read from front to back", "soft")
    for k in range(8):
        for g, (gate, kind) in enumerate(GATES):
            p.box(380 + g * 112, 62 + k * 24, 108, 20, kind, gate if k == 0 else "", "mono")
        p.text(370, 77 + k * 24, ("k = 0" if k == 0 else str(k)) if k < 7 else "…", "mono", "end")
    p.text(434, 272, "one vector", "soft", "middle")
    p.line((380, 258), (488, 258))

    p.text(335, 318, "a tile: 6 sequences × the panel, summed in registers", "big")
    for r in range(6):
        p.box(335, 332 + r * 20, 96, 16, "", f"h[{r}, k]" if r == 0 else "", "mono")
        for g, (_, kind) in enumerate(GATES):
            p.box(462 + g * 92, 332 + r * 20, 88, 16, kind)
    p.text(446, 394, "×", "big", "middle")
    p.text(335, 472, "one value of h", "soft")
    p.text(335, 490, "for all lanes", "soft")
    p.text(462, 472, "6 × 4 sums; after the last k the cell runs on them where", "soft")
    p.text(462, 490, "they are, so these gates are not written to memory", "soft")
    return p


def time_loop() -> Picture:
    """Draws chunks of the input product and of steps, and two ways to divide the steps."""
    p = Picture(860, 560)
    p.text(20, 26, "one layer, forward", "big")
    x = 20.0
    for word, width, kind in (
        ("pack W, U", 90, "b"),
        ("x W", 64, "a"),
        ("steps 0–3", 150, "c"),
        ("x W", 64, "a"),
        ("steps 4–7", 150, "c"),
        ("x W", 64, "a"),
        ("steps 8–11", 150, "c"),
    ):
        p.box(x, 44, width, 36, kind, word)
        x += width + 6
    p.text(x + 4, 67, "…", "big")
    p.line((20, 96), (828, 96), arrow=True)
    p.text(828, 114, "time", "soft", "end")
    p.text(
        116, 114, "a chunk: x W of some steps, 512 KiB, still in L2 when the loop reads it", "soft"
    )

    p.text(20, 160, "steps by rows: many sequences", "big")
    p.text(
        20,
        180,
        "each thread takes its own sequences through all steps and waits for no other",
        "soft",
    )
    widths = ((104, 96, 110, 98), (118, 101, 92, 107))
    for thread in range(2):
        y = 194 + thread * 56
        p.text(20, y + 29, f"thread {thread + 1}", "mono")
        x = 100.0
        for t, width in enumerate(widths[thread]):
            p.box(x, y, width, 46, "c")
            p.text(x + width / 2, y + 20, f"step {t}", "", "middle")
            p.text(x + width / 2, y + 37, ("rows 0–15", "rows 16–31")[thread], "soft", "middle")
            x += width + 3
    p.text(548, 232, "a sequence needs only its own h", "soft")
    p.text(548, 252, "of the previous step", "soft")

    p.text(20, 350, "steps by units: few sequences, a large U", "big")
    p.text(
        20,
        370,
        "each step is cut into slices of hidden units; the next step needs all of h",
        "soft",
    )
    slices = ((0, 1), (0, 1, 2), (0, 1), (0, 1))
    for thread in range(2):
        y = 384 + thread * 56
        p.text(20, y + 29, f"thread {thread + 1}", "mono")
    for t in range(4):
        x = 100 + t * 152
        mine = slices[t]
        others = [s for s in range(4) if s not in mine]
        for thread, own in enumerate((mine, others)):
            width = 132 / max(len(mine), len(others))
            for i, s in enumerate(own):
                p.box(x + i * width, 384 + thread * 56, width - 4, 46, "d", str(s), "mono")
        p.line((x + 139, 378), (x + 139, 492), dashed=True)
        p.text(x + 64, 512, f"step {t}", "", "middle")
    p.text(712, 428, "dashed: a step", "soft")
    p.text(712, 446, "waits for all of", "soft")
    p.text(712, 464, "the previous one", "soft")
    p.text(100, 540, "In step 1 thread 2 came late: thread 1 claimed slice 2 as well.", "soft")
    return p


def persistent_kernel() -> Picture:
    """Draws blocks of a GPU that keep their weights through all steps and meet at a barrier."""
    p = Picture(860, 560)
    p.text(20, 26, "one cooperative launch for all T steps", "big")
    p.text(
        20,
        46,
        "each block keeps its part of U in registers and shared memory for the whole sequence",
        "soft",
    )
    names = ("block 0", "block 1", "block 2", "block n − 1")
    units = ("units 0–7", "units 8–15", "units 16–23", "the last units")
    xs = (110, 300, 490, 690)
    for x, title, part in zip(xs, names, units, strict=True):
        p.box(x, 62, 150, 64, "b")
        p.text(x + 75, 84, title, "mono", "middle")
        p.text(x + 75, 102, f"U of {part}", "", "middle")
        p.text(x + 75, 119, "stays on the chip", "soft", "middle")
    p.text(664, 98, "…", "big", "middle")

    for step in range(2):
        top = 152 + step * 190
        label = "t" if step == 0 else "t + 1"
        p.text(20, top + 76, f"step {label}", "big")
        for i, x in enumerate(xs):
            p.box(x, top, 150, 26, "a", "x W loaded ahead")
            p.box(x, top + 46, 150, 26, "c", "h U of my units")
            p.box(x, top + 76, 150, 26, "c", "cell")
            p.box(x, top + 106, 150, 26, "d", f"my h → buffer {1 - step}")
            if i == 2:
                p.text(664, top + 76, "…", "big", "middle")
        p.line((100, top + 36), (846, top + 36), dashed=True)
        p.text(94, top + 41, "wait", "soft", "end")
        p.text(94, top + 124, "arrive", "soft", "end")
        p.text(
            110,
            top + 152,
            "y and the values for backward are written after the arrival: no block waits for them",
            "soft",
        )
    p.text(
        110,
        536,
        "Two buffers alternate, so a block that is ahead cannot overwrite what others still read.",
        "soft",
    )
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "packed-panel.svg": packed_panel,
    "time-loop.svg": time_loop,
    "persistent-kernel.svg": persistent_kernel,
}


def main() -> None:
    """Writes the pictures into the folder that the command line names."""
    for name, draw in PICTURES.items():
        (Path(sys.argv[1]) / name).write_text(draw().svg())


if __name__ == "__main__":
    main()
