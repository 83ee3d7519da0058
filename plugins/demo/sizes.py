"""The sizes of the demo backbone."""

from __future__ import annotations

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID = 192, 12, 3, 768, 14, 20
