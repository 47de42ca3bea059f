"""Instruments beside the path: where figures come from, speed by layer, tables, pictures, the HTML page."""
