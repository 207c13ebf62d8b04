"""Input: what data sets exist, how batches are made of them, and what is done to the images.

Only this package imports TensorFlow, and `mix.py`, which runs in the step, does without it.
"""
