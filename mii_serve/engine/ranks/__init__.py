"""One replica on several devices: a group of processes, the ranks, that run the same plans in the same order.

Rank 0 is the replica process: it has the scheduler and the socket, and `leader.RankedEngine` is its engine. It starts the other
ranks, the followers (`follower`), and writes each order to their standard inputs before it runs it itself. Tensors go through a
`group.RankGroup`. How a UNet call is split over the ranks is up to the kernel set.

Orders go through pipes and not through a collective, because a collective waits for every rank: a follower that waits for the
next order of an idle server would run into the group's timeout, and a rank that is lost would show up as a hang. A pipe can be
waited on for ever and closes when rank 0 ends.
"""
