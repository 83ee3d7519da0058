"""Writes docs/tour.ipynb: a tour of the Python functions on the demo model, executed, with what it showed.

python docs/tour.py      executes it anew in a temporary folder; takes a minute
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("tour.ipynb")
CELLS = """
# A tour of sinder

Predict, look, repair, compare and export, on a small model with a planted defect that comes with sinder: no download, a
minute on two cores. Put `dinov2_vits14` in the place of `demo_vit`, and your photographs into `photos/`, and it is your
model.
----
from pathlib import Path

from sinder_plugins.demo.drawing import draw_images  # stands for your photographs

import sinder_cli as sinder

photos = Path("photos")
photos.mkdir(exist_ok=True)
for at, image in enumerate(draw_images(12, seed=5)):
    image.save(photos / f"{at}.png")
----
## Predict

From the weights alone: does a direction settle that tokens would be turned into?
----
sinder.predict_defects(sinder.PredictRequest("demo_vit", stages=["cumulative"]))
----
## Look

At one photograph: what stands out, whether the weights predict it, what it spoils, and whether to repair.
----
before = sinder.AnalyzeRequest("demo_vit", [photos / "0.png"])
sinder.look([before])
----
## Repair

The verdict is made on photographs that were not trained on.
----
sinder.repair(sinder.RepairRequest("demo_vit", data=[photos]), out="run", progress=True)
----
## Compare

The same photograph with the original and with the run.
----
sinder.look([before, sinder.AnalyzeRequest("run", [photos / "0.png"])])
----
Does it help? Without labels, with placebos, and intervals over images:
----
settings = sinder.EvaluateSettings(resamples=200)
sinder.evaluate(sinder.EvaluateRequest("run", ["dense"], data=[photos], settings=settings))
----
## Export

What was written is loaded by its library, in another process, before it gets its name.
----
sinder.export(sinder.ExportRequest("run", sinder.ExportSettings("native")), out="repaired.safetensors")
"""  # texts and code in turn


def tour() -> nbformat.NotebookNode:
    """Return the notebook, not executed."""
    makers = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    cells = [makers[at % 2](source.strip("\n")) for at, source in enumerate(CELLS.split("----\n"))]
    for at, cell in enumerate(cells):
        cell.id = f"cell-{at:02}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with what its cells showed when they ran in this folder. Raises an error if one fails."""
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):  # the record itself, as text, is of no use beside it
                output.data.pop("text/plain", None)
    return notebook


def main() -> None:
    """Execute the notebook in a temporary folder, and write it."""
    with tempfile.TemporaryDirectory() as name:
        nbformat.write(executed(tour(), Path(name)), NOTEBOOK)


if __name__ == "__main__":
    main()
