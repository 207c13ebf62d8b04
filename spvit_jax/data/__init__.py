"""Input: what data sets exist, how batches are made of them, and what is done to the images.

Only this package imports TensorFlow. What runs in the step, on the device, does without it:
`mix.py`, `randaugment.py`, `pixels.py` and `token_labels/align.py`.
"""
