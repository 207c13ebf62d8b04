"""Pictures of what `analysis` measures, with matplotlib: figures for PNG files and for pages.

`charts` has heat maps and curves, `mosaic` tables of small pictures, such as a map for each layer
and head, and `style` what all of them share and how they are written.
"""
