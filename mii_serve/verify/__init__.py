"""Holds an engine against the FP32 reference: a fixed set of questions to each stage, whole pictures, stated limits.

The reference answers first and is freed before the engine is loaded, so that both never need memory at once:

    truth = learn_truth(config)
    engine = build_engine(config)
    report = verify(engine, truth)

What is asked is in `cases.py`, how far an answer may be off in `limits.py`, what is reported in `report.py`. Nothing here
decides what a failure means: the command exits with it, a replica refuses to become ready.
"""
