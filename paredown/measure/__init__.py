"""What an exported file scores, takes and needs."""
