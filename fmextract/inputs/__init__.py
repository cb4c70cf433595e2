"""Open sources of images, and decode them to the inputs of a model."""
