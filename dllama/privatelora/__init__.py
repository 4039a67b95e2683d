"""PrivateLoRA: the edge keeps what is private, the cloud does the heavy work (https://arxiv.org/abs/2311.14030).

To the product with a matrix W the adapter adds ``B·M·A·x``. A and B are random and frozen, and live in the cloud; M, a
small square matrix, is what was trained, and never leaves the edge.

``shape`` says which matrices are adapted, ``frozen`` makes A and B out of a seed, ``adapter`` has both halves in memory
and in files.
"""
