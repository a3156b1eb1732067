"""Figures of the notebooks beyond the paper (06 to 08), in the style of :mod:`fortify.figures`."""
