"""Responsible use: the watermark of every painting, the hook of a safety checker, the model card."""
