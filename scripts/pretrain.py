"""Train one part of the embedded default model on the small world of labelled pictures."""
