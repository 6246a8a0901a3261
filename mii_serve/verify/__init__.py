"""Compares an engine with the FP32 reference: fixed inputs to each stage, whole pictures, stated limits.

The reference runs first and is freed before the engine is loaded, so that both never need memory at once:

    truth = learn_truth(config)
    engine = build_engine(config)
    report = verify(engine, truth)

The inputs are in `cases.py`, the limits in `limits.py`, the report in `report.py`. What a failure means is decided by the
caller: the command exits with it, a replica refuses to become ready.
"""
