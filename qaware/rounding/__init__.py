"""Rounding methods: how the integers of a weight are chosen after training, inside the grid that ships."""
