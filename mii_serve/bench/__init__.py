"""A load generator whose figures can be believed.

`mix` and `arrivals` say what is asked and when, as pure functions of a seed; `load` asks it of a server through a driver
(`grpc_driver`, `http_driver`, `mii_driver`) and times every request from the moment it was meant to start; `check` holds a
sample of the pictures against the reference engine, so that a fast wrong server does not win; `summary`, `compare`, `tables`
and `html` turn the records into figures. Nothing here knows how a server works inside: what the server says of itself comes
over its public faces (`observe`).
"""
