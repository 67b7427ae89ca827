"""Rows of measurements, and what is made of them: the table, the plot, the report."""
