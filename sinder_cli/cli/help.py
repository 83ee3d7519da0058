"""What help and manual pages say beside each option's own words: groups of options, and examples."""

from __future__ import annotations

from typing import Any

PANELS = {
    "Model": "model weights adapter heads revision branch attention",
    "Second model": "compare compare_weights compare_adapter compare_heads",
    "Images": "data more_data train image_size resize max_tokens limit scan_images eval_images strict",
    "Output": (
        "out picture license base_model force format features figures figure_formats resume dry_run fail_on_defects"
    ),
    "Machine": "device dtype tf32 batch_size workers offload seed config",
    "Which tokens are defective": (
        "mark norm_factor mask_threshold min_tokens min_gap kernel norm_threshold exclude_masked"
    ),
    "How singular values move": "recipe step trust max_drift min_gain lr momentum target temperature window visit",
    "How long, and what is kept": (
        "max_steps stop_clean_fraction stop_images eval_every min_fidelity keep checkpoint_every log"
    ),
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
OTHERS = "Options"  # the panel of all other options

EXAMPLES = {
    "predict-defects": (
        ("the directions of an official model", "sinder predict-defects dinov2_vits14"),
        (
            "of a checkpoint, as safetensors",
            "sinder predict-defects dinov2_vitg14 --weights vitg14.pth -o directions.safetensors",
        ),
    ),
    "analyze": (
        ("one photograph, in five lines and a picture", "sinder analyze dinov2_vits14 photo.jpg"),
        (
            "a run before and after, with a report",
            "sinder analyze dinov2_vits14 --data photos/ --compare run/ --out analysis/",
        ),
    ),
    "repair": (
        ("with the default recipe", "sinder repair dinov2_vitl14 --data photos/ --out run/"),
        ("go on with an interrupted run", "sinder repair run/ --resume"),
    ),
    "evaluate": (
        ("without labels", "sinder evaluate run/ dense --data photos/ --out eval/"),
        ("on class folders, two tasks", "sinder evaluate run/ knn linear --data classes/ --out eval/"),
    ),
    "export": (
        ("for transformers", "sinder export run/ --to transformers --out folder/"),
        ("the small file of the changes alone", "sinder export run/ --to adapter --out repaired.safetensors"),
    ),
    "backbones": (
        ("all models", "sinder backbones"),
        ("those whose names hold a word", "sinder backbones --filter dinov3"),
    ),
    "check-backbone": (
        ("a plugin that draws its weights", "sinder check-backbone demo_vit"),
        ("with a checkpoint", "sinder check-backbone dinov2_vits14 --weights vits14.pth"),
    ),
    "runs": (
        ("all runs below a folder", "sinder runs sinder-runs/"),
        ("the verdicts, for a script", "sinder runs sinder-runs/ --format json | jq '.[].verdict'"),
    ),
    "doctor": (
        ("what is installed here", "sinder doctor"),
        ("for pasting into an issue", "sinder doctor --format json"),
    ),
    "demo": (
        ("predict, repair and export a small model", "sinder demo"),
        ("into a folder of one's own", "sinder demo --out demo/"),
    ),
    "man": (
        ("the main page", "sinder man"),
        ("the page of a command", "sinder man repair"),
    ),
}


def dressed(command: Any, name: str) -> Any:
    """Give a loaded subcommand its groups of options, its examples and `-h`; flags show no type."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            parameter.rich_help_panel = PANEL_OF.get(parameter.name, OTHERS)
            if parameter.is_flag:
                parameter.metavar = ""
    command.params.sort(key=_place)
    command.context_settings = {**command.context_settings, "help_option_names": ["-h", "--help"]}
    command.epilog = "\n\n".join(f"[bold]{line}[/]  {words}" for words, line in EXAMPLES[name])
    return command


def _place(parameter: Any) -> int:
    """Return the place of a parameter's group; arguments come first, and groups keep their order."""
    if parameter.param_type_name != "option":
        return -1
    return list(PANELS).index(PANEL_OF[parameter.name]) if parameter.name in PANEL_OF else len(PANELS)
