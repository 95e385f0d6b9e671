"""One file a family, named after its ``model_type``; each holds ``FAMILY``."""
