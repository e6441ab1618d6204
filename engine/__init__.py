"""The decoding engine: policy, cache, session, generation."""
