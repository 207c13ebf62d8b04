"""Token labels: for each image a map of class logits made by a teacher (arXiv 2104.10858).

A label map holds the five largest logits and their classes on a grid over the whole image, as one
array [2, 5, h, w] float16, logits first. `store.py` reads and writes them on disk,
`augment/label_maps.py` crops them on the device; the commands are

    python -m spvit_jax.data.token_labels pack   the published .pt files
    python -m spvit_jax.data.token_labels make   new ones, with any model that has a dense head
    python -m spvit_jax.data.token_labels show   one image with its labels, as a picture
"""
