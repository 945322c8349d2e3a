"""Pages and pictures that need neither a model nor a notebook, so that a trace can draw itself."""
