"""The figures of the notebooks beyond the paper (06 to 08), in the style and at the sizes of :mod:`fortify.figures`."""
