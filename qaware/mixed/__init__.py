"""Sensitivity of layers, and the search of a scheme for each: mixed precision.

Public as :func:`qaware.sensitivity` and :func:`qaware.search`.
"""
