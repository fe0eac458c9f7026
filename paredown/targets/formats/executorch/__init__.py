"""A model as a .pte file for XNNPACK."""
