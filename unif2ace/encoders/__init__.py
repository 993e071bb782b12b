"""Frozen image encoders by name, and the cache of what they compute.

    clip         CLIP's vision tower through transformers (a local folder)          semantic  [B, 577, 1024]
    open-clip    CLIP's vision tower through open_clip (a local folder)             semantic  [B, 577, 1024]
    antelopev2   SCRFD-10G + ArcFace R100 of InsightFace (a local folder)           identity  [B, 512]
    arcface-mbf  SCRFD-0.5G + ArcFace MobileFaceNet of InsightFace (a package)      identity  [B, 512]
    sface        YuNet + SFace (a package)                                          identity  [B, 128]

Nothing is ever downloaded: weights come from the user's own folder or from an installed package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from unif2ace.encoders.base import Encoder, FaceCountError
from unif2ace.encoders.cache import FeatureCache
from unif2ace.errors import UserError

SEMANTIC = ("clip", "open-clip")
IDENTITY = ("antelopev2", "arcface-mbf", "sface")
KINDS = (*SEMANTIC, *IDENTITY)
LATENTS = "image_tokenizer"  # in the place of a semantic encoder: the image tokenizer's own latents

__all__ = ["IDENTITY", "KINDS", "LATENTS", "SEMANTIC", "Encoder", "FaceCountError", "FeatureCache", "encoder"]


def encoder(kind: str, path: Path | str | None = None, device: str | torch.device = "cpu", **options) -> Encoder:
    """The encoder of a name; says on stderr whose licence its weights are under.

    Args:
        kind: one of KINDS, or KIND:PATH.
        path: the folder of its weights; None for the two that come as packages.
        device: where it computes and its features come to lie.
        options: of the encoder's own class.

    Raises:
        UserError: there is no such encoder, or its weights or a package are missing, damaged or not as published.
    """
    kind, _, folder = kind.partition(":")
    path = folder or path
    if kind not in KINDS:
        raise UserError(f"there is no encoder {kind!r}: expected one of {', '.join(KINDS)}")
    made: Encoder
    if kind in SEMANTIC:
        from unif2ace.encoders.clip import Clip, OpenClip

        if path is None:
            raise UserError(f"{kind} needs the folder of your copy: {kind}:PATH; it is never fetched")
        made = (Clip if kind == "clip" else OpenClip)(Path(path), device, **options)
    elif kind == "sface":
        from unif2ace.encoders.sface import SFace

        if path is not None:
            raise UserError(f"sface comes as a package and takes no folder, got {path}")
        if torch.device(device).type != "cpu":
            raise UserError(f"sface runs on the CPU, not on {device}: leave the device out")
        made = SFace(**options)
    else:
        from unif2ace.encoders.arcface import ArcFace

        made = ArcFace(kind, None if path is None else Path(path), device, **options)
    print(f"{kind}: licence of the weights: {made.licence}", file=sys.stderr)
    return made
