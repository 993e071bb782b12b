"""Sources of attributes by name, as settings and commands give them.

classifier:FOLDER    a head that `unif2ace train-attributes` wrote
face-parser:FILE     the face parser of an npm package, its .tgz file or folder, and the rules on its maps
measured:FACES.npz   what the demo measures, with the cut points of these faces
"""

from __future__ import annotations

from pathlib import Path

import torch

from unif2ace.attributes.base import AttributeSource
from unif2ace.errors import UserError

SOURCES = ("classifier", "face-parser", "measured")


def open_source(name: str, device: str | torch.device = "cpu") -> AttributeSource:
    """The source of a name; nothing is fetched.

    Raises:
        UserError: there is no such source, or its files are missing, damaged or not as published.
    """
    kind, _, path = name.partition(":")
    if kind not in SOURCES or not path:
        raise UserError(
            f"there is no source of attributes {name!r}: expected classifier:FOLDER, face-parser:FILE or "
            "measured:FACES.npz"
        )
    if kind == "classifier":
        from unif2ace.attributes.head import AttributeClassifier

        return AttributeClassifier(path, device)
    if kind == "measured":
        from unif2ace.attributes.measured import Measured
        from unif2ace.data.dataset import FaceSet

        return Measured(FaceSet.load(Path(path)).thresholds)
    from unif2ace.attributes.parsed import ParsedAttributes

    return ParsedAttributes(path, device)
