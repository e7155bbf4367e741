"""Reads images: checks them against their limits from the header alone, then decodes them to BGR pixels."""
