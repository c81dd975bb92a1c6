"""The README's pictures, out of eval.py's page: python tests/picture.py report.html"""

import re
import sys
from pathlib import Path

INK = {"light": "#1f2328", "dark": "#e6edf3"}
PICTURES = {"advantage": "advantage of each token", "curves": "validation Avg against step"}

page = Path(sys.argv[1]).read_text(encoding="utf-8")
folder = Path(__file__).resolve().parent.parent / ".github"
folder.mkdir(exist_ok=True)
for name, title in PICTURES.items():
    picture = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if f"<title>{title}" in svg)
    for theme, ink in INK.items():
        (folder / f"{name}-{theme}.svg").write_text(picture.replace("<svg ", f'<svg style="color:{ink}" ', 1) + "\n", encoding="utf-8")
