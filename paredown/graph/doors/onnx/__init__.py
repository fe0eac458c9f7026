"""The door for ONNX files: read, put in order, and interpreted as a PyTorch module."""
