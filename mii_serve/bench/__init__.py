"""A load generator for image servers.

`mix` and `arrivals` define the requests and their times, as pure functions of a seed. `load` sends them through a driver
(`grpc_driver`, `http_driver`, `mii_driver`) and measures each from the moment it was meant to start. `check` compares a sample
of the pictures with the reference engine's, so that a server cannot win with wrong pictures. `observe` reads the server's
metrics. `summary` and `spread` compute the figures; `result`, `tables` and `html` report them.

Against a gRPC server this runs on the base installation; what a flag needs beyond it is imported with that flag.
"""
