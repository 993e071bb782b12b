"""The model as transformers knows its own: importing this registers it with the Auto classes.

from unif2ace import UniF2aceForConditionalGeneration       (or: import unif2ace.auto)
model = AutoModel.from_pretrained(folder)
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.processing import UniF2aceProcessor

__all__ = ["UniF2aceConfig", "UniF2aceForConditionalGeneration", "UniF2aceProcessor"]

AutoConfig.register(UniF2aceConfig.model_type, UniF2aceConfig, exist_ok=True)
AutoProcessor.register(UniF2aceConfig, UniF2aceProcessor, exist_ok=True)
for _kind in (AutoModel, AutoModelForImageTextToText):
    _kind.register(UniF2aceConfig, UniF2aceForConditionalGeneration, exist_ok=True)
