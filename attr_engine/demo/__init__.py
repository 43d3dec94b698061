"""A small corpus of composed and synthesised music with known relations between its tracks."""
