"""Where networks come from: a model.py, a Transformers configuration, a hub id."""
