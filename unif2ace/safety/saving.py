"""Paintings to files: watermarked unless told otherwise, and labelled as painted by a model in the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unif2ace.errors import UserError
from unif2ace.files import replacing
from unif2ace.safety import watermark

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
JPEG_QUALITY = 95
SOFTWARE = "unif2ace"
NOTICE = "Painted by a model (UniF2ace); shows no real person"
# IPTC's term for a picture that a trained model made; programs that label such pictures look for it
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"/></rdf:RDF></x:xmpmeta>'
)
PAINTED, REPAINTED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"


def can_write(path: Path, force: bool) -> None:
    """Look before the work: is it a picture's name, and free?

    Raises:
        UserError: another kind of file, a folder, or there is one already and `force` is not set.
    """
    path = Path(path)
    if path.is_dir() or not path.name:
        raise UserError(f"cannot write {path}: it is a folder, give the name of a file in it")
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot write {path}: its name has to end in {', '.join(FORMATS)}")
    if path.exists() and not force:
        raise UserError(f"{path} is there already: give another --out, or --force to replace it")


def save(
    path: Path, image: np.ndarray, text: Mapping[str, str], marked: bool = True, kind: str = PAINTED, force: bool = True
) -> bool:
    """Write a painting, whole or not at all.

    Args:
        image: [H, W, 3] uint8 RGB.
        text: what to say of it in the file (prompt, seed, ...); PNG has one entry each, JPEG one comment.
        marked: with the invisible watermark.
        kind: `PAINTED`, or `REPAINTED` where a part of it is a picture that was given.

    Returns:
        Whether the file carries a watermark that JPEG at quality 90 does not take away.
    """
    path = Path(path)
    can_write(path, force)
    if marked:
        image = watermark.mark(image)
    entries = {"Software": SOFTWARE, "Description": NOTICE if kind == PAINTED else f"In part: {NOTICE}", **text}
    xmp = _XMP.format(kind=kind)
    with replacing(path) as partial:
        if FORMATS[path.suffix.lower()] == "PNG":
            chunks = PngInfo()
            for key, value in entries.items():
                chunks.add_itxt(key, value)
            chunks.add_itxt("XML:com.adobe.xmp", xmp)
            Image.fromarray(image).save(partial, format="PNG", pnginfo=chunks)
        else:
            comment = "\n".join(f"{key}: {value}" for key, value in entries.items())
            Image.fromarray(image).save(
                partial, format="JPEG", quality=JPEG_QUALITY, comment=comment.encode(), xmp=xmp.encode()
            )
    return marked and watermark.detect(image).found
