"""The benchmark suite: one module per question in :mod:`bench.questions`, the machinery here.

``python -m bench`` asks all of them; see bench/README.md.
"""
