"""Identifiers of licences that the Hugging Face Hub accepts in the head of a model card.

The list is that of https://huggingface.co/docs/hub/repositories-licenses. For a licence that is not in it, the Hub
wants `other`, with a name of its own and a file that holds its text.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches

from sinder_cli.errors import UsageError

OTHER = "other"
FILE = "LICENSE"  # that holds the text of another licence
_LISTED = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
"""
LICENCES = frozenset(_LISTED.split())


def require_licence(named: str) -> None:
    """Raise `UsageError`, with the nearest identifier, for a licence that the Hub does not accept."""
    if named in LICENCES:
        return
    near = nearest(named)
    hint = f"did you mean {near}, or other?" if near else "give for example apache-2.0, or other for an unlisted one"
    raise UsageError(f"bad licence {named!r}", "the Hub has no such identifier", hint)


def nearest(named: str) -> str | None:
    """Return the identifier that a text resembles; None if there is none."""
    text = re.sub(r"[\s_]+", "-", named.strip().lower())
    found = get_close_matches(text, sorted(LICENCES - {OTHER, "unknown"}), n=1, cutoff=0.6)
    return found[0] if found else None


def metadata(licence: str) -> list[str]:
    """Return the lines of a card's head for a licence; one that is not in the list is another, with its name."""
    if licence in LICENCES and licence != OTHER:
        return [f"license: {json.dumps(licence)}"]
    name = "license-of-the-base-model" if licence == OTHER else licence
    return [f"license: {json.dumps(OTHER)}", f"license_name: {json.dumps(name)}", f"license_link: {json.dumps(FILE)}"]
