"""Show-o (showlab/show-o and its kin) to our transformer: the same function, by its public state-dict names.

Its names are PhiForCausalLM's behind `showo.`; its vocabulary is ours, row for row. The projector of its CLIP variant
(`mm_projector`) has no place here: CLIP features come in through the sequence-level experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unif2ace.configs import VocabularyConfig
from unif2ace.errors import UserError
from unif2ace.importers import phi
from unif2ace.importers.phi import Options
from unif2ace.importers.weights import Weights
from unif2ace.model.modeling import UniF2aceForConditionalGeneration

LICENCE = "MIT or Apache-2.0 (as published with each of Show Lab's models; the code is Apache-2.0)"
PREFIX = "showo."


def import_showo(
    path: Path | Weights,
    options: Options = Options(),  # noqa: B008  it is frozen
) -> tuple[UniF2aceForConditionalGeneration, list[str]]:
    """Read a Show-o.

    Args:
        path: a file of weights, an index of shards, or the folder of either, with its config.json; or those weights,
            open.

    Returns:
        The model, and lines that say what went where.

    Raises:
        UserError: it is not one, whole, of one shape throughout and of the vocabulary that its config names.
    """
    weights = Weights.of(path)
    sizes = dataclasses.replace(phi.Sizes.read(weights, PREFIX, "a Show-o"), qk_norm=True)
    defaults = VocabularyConfig()
    vocabulary = VocabularyConfig(
        weights.whole("llm_vocab_size", defaults.text), weights.whole("codebook_size", defaults.codes)
    )
    if sizes.rows != vocabulary.size:
        raise UserError(
            f"{weights.path}: its vocabulary has {sizes.rows} rows, but {vocabulary.text} text tokens, 10 special "
            f"ones, {vocabulary.codes} image codes and a mask make {vocabulary.size}: put its own config.json beside it"
        )
    unplaced = weights.check(sizes.shapes(PREFIX), "a Show-o", (*phi.NOT_PLACED, "mm_projector."))
    config = sizes.config(vocabulary, weights.whole("num_vq_tokens", 256), options)
    model = phi.build(config, weights, PREFIX, sizes, sizes.rows)
    told = [
        f"licence: {weights.licence(LICENCE)}",
        *weights.checked,
        f"placed: {sizes.layers} layers, all {sizes.rows} rows of the vocabulary",
    ]
    return model, told + phi.not_placed(unplaced) + phi.experts_told(config)
