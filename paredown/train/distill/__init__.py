"""What a student is taught, and by whom."""
