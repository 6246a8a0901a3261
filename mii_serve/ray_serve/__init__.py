"""This server on Ray Serve, for more than one machine: Ray places, starts, counts and replaces; the front and the replicas are
the ones of `mii_serve deploy`.

`app.py` has the two deployments and alone imports Ray. `front.py` is the front, `replica.py` a replica and the address at which
fronts reach it, `proxied.py` answers the gRPC calls that come through Ray's proxy, `arguments.py` reads the arguments of the
application, `scaling.py` says how many replicas there are to be.
"""
