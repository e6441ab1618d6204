"""Many cells: what they are, who measures them, and the file that keeps them."""
