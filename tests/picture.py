"""The README's pictures.

    python tests/picture.py report.html            two out of eval.py's page
    python tests/picture.py drift-0.json …         the drift dial, out of what eval.py --json wrote for each drift
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval

INK = {"light": "#1f2328", "dark": "#e6edf3"}
ON_PAGE = {"advantage": "advantage of each token", "curves": "validation Avg against step"}


def drift_dial(files: list[str]) -> dict[str, str]:
    """{name: picture}: test Avg of both teachers after training, and where their signal lies before it, against drift."""
    learned, located = {}, {}
    for file in sorted(files, key=lambda name: float(Path(name).stem.rpartition("-")[2])):
        drift, numbers = float(Path(file).stem.rpartition("-")[2]), json.loads(Path(file).read_text())
        for context in "critique", "reference":
            learned.setdefault(context, []).append((drift, numbers["results"][context]["avg"]["seeds"]))
            located.setdefault(context, []).append((drift, [numbers["advantages"][context]["share wrong value"][0]]))
            print(context, drift, *(f"{series[context][-1][1]}" for series in (learned, located)))
    return {
        "drift-learned": eval.line_chart(learned, "test Avg@12", "drift"),
        "drift-located": eval.line_chart(located, "share of |A_t| on wrong values", "drift"),
    }


if sys.argv[1].endswith(".json"):
    pictures = drift_dial(sys.argv[1:])
else:
    drawn = re.findall(r"<svg.*?</svg>", Path(sys.argv[1]).read_text(encoding="utf-8"), re.DOTALL)
    pictures = {name: next(svg for svg in drawn if f"<title>{title}" in svg) for name, title in ON_PAGE.items()}

folder = Path(__file__).resolve().parent.parent / ".github"
folder.mkdir(exist_ok=True)
for name, picture in pictures.items():
    for theme, ink in INK.items():
        (folder / f"{name}-{theme}.svg").write_text(picture.replace("<svg ", f'<svg style="color:{ink}" ', 1) + "\n", encoding="utf-8")
