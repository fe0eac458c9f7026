"""A model as OpenVINO's .xml and .bin."""
