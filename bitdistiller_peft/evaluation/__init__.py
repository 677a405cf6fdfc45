"""Perplexity with a protocol id, divergence from the teacher."""
