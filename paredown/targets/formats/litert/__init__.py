"""A model as a .tflite file."""
