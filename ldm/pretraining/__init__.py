"""The embedded model's small world of labelled pictures, and the training of its parts."""
