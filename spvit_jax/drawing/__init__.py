"""Pictures of what `analysis` measures, with matplotlib: figures for PNG files and for pages.

`charts` has heat maps and curves, `mosaic` tables of small pictures, such as a map for each layer
and head; `gallery` draws all that is known of a model, with words, and `predictions` what `predict`
has found; `style` is what all share, and how they are written.
"""
