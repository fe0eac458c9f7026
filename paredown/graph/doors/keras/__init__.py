"""A Keras file: read by Keras on its torch backend, and told again in torch's own layers."""
