"""The embedded model's toy world of labelled images, and the training of its parts."""
