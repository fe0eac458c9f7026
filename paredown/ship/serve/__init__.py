"""Two models behind one endpoint, the compressed one under guard."""
