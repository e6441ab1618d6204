"""What a model decodes: recorded, and held against later."""
