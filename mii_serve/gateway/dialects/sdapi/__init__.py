"""AUTOMATIC1111's web API, `/sdapi/v1/...`, as version 1.10 of it answers: for the many clients that were written for it.

`routes` makes the routes; `body` reads requests, `samplers` names of samplers, `images` the images in them, `generate` answers,
`tasks` knows what runs, for `progress` and `interrupt`, and `describe` is the rest: what such a server says of itself.
"""
