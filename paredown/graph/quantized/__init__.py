"""The one quantized form: integers in a graph that still trains."""
