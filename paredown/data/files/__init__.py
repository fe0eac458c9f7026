"""Files of samples -> tables of columns; read as they are asked for, and nothing in them is run."""
