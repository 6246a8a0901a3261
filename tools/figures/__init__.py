"""The tables and plots of measured figures, each a function of the files in benchmarks/results."""
