"""`unif2ace precompute`: pictures and words to shards that training reads fast."""

from __future__ import annotations

import argparse

from unif2ace.data.precompute import PrecomputeConfig, precompute
from unif2ace.settings import parse, read_settings


def run(parsed: argparse.Namespace) -> None:
    """Write the shards, or go on with them, and say what is there."""
    config = parse(PrecomputeConfig, read_settings(parsed.config, parsed.overrides), "")
    manifest = precompute(config)
    skipped = manifest["skipped"]
    print(
        f"{config.out}: {manifest['samples']} samples in {len(manifest['shards'])} shards; passed over: "
        f"{skipped['corrupt']} that could not be read, {skipped['unusable']} of no use"
    )
