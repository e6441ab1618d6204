"""Pass keys hidden in a text, and which caches find them."""
