"""`python -m bench.plot RESULTS.json > docs/flat-maps.svg`: what one change costs by the number of Services, as a picture.

RESULTS.json is what `python -m bench services` wrote, or the `--json` of `python -m bench.services`.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 40, 50
LINES = (
    ("podwire", "podwire (flat maps)", "#0b6e4f"),
    ("chain_per_service_nft", "chains, by nft", "#c2410c"),
    ("chain_per_service_iptables", "chains, by iptables-restore", "#6d28d9"),
)
_TEXT = 'font-family="sans-serif" font-size="12" fill="#555"'


def plot(figures: dict[str, Any]) -> str:
    """An SVG of milliseconds for one changed endpoint, both axes logarithmic."""
    sizes = sorted(int(size) for size in figures if size.isdecimal())
    curves = {
        name: [(size, found["change_ms"]) for size in sizes if "change_ms" in (found := figures[str(size)].get(name) or {})]
        for name, _, _ in LINES
    }
    values = [value for curve in curves.values() for _, value in curve]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log10(sizes[0]), math.log10(sizes[-1])

    def x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(size) - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(value) - low) / ((high - low) or 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Time to program one changed endpoint, by the number of Services</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" {_TEXT} font-weight="bold">milliseconds to program one changed endpoint</text>',
    ]
    for power in range(low, high + 1):
        at = y(10**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" {_TEXT} text-anchor="end">{10**power:g}</text>')
    foot = HEIGHT - BOTTOM + 20
    parts += [f'<text x="{x(size):.1f}" y="{foot}" {_TEXT} text-anchor="middle">{size:,}</text>' for size in sizes]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 8}" {_TEXT} text-anchor="middle">Services</text>')
    for name, label, colour in LINES:
        curve = curves[name]
        if not curve:
            continue
        points = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(size):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>' for size, value in curve]
        end, value = curve[-1]
        style = _TEXT.replace("#555", colour)
        parts.append(f'<text x="{x(end) + 8:.1f}" y="{y(value) + 4:.1f}" {style}>{label}: {value:.3g}</text>')
    return "\n".join((*parts, "</svg>", ""))


if __name__ == "__main__":
    document = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(plot(document.get("services", document)))
