"""The evaluation of a model over guidance scales: which rows to make, and what to measure of their pictures.

The pictures are those of a batch job (`mii_serve.batch`), so an evaluation goes on where it stopped. `sweep` writes the job's
rows, `pictures` reads what it has made, `networks` and `features` compute what networks see in pictures, `frechet` and
`estimates` are the statistics, `measure` puts them together, `report` and `plot` write them down.
"""
