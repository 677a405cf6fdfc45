"""The named systems and presets, as plain data."""
