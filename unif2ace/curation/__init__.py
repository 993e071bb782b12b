"""Pictures of faces to a set that teaches: checks, captions, attributes, questions, filters, a card."""
