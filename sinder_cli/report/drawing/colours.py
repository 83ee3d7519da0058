"""The colours that charts, pictures and pages share."""

from __future__ import annotations

INK, SOFT, RULE, FAINT, LINE, ACCENT = "#1d1c1a", "#5f5b55", "#dedad3", "#ebe8e2", "#2b5c8a", "#c2500f"
# The light colours of the page. An SVG has the variables of their names instead, which know the dark ones too.
COLOURS = {"ink": INK, "soft": SOFT, "rule": RULE, "faint": FAINT, "line": LINE, "accent": ACCENT}
ABSENT = (138, 138, 138)  # of a map, where there is no value: a grey that no colour map has
BRIGHT = "inferno"  # matplotlib's name of the colour map, perceptually uniform, on which what stands out is bright
