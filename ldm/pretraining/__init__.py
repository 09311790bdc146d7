"""The embedded model's small world of labelled images, and the training of its parts."""
