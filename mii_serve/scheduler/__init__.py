"""Decides which samples step next. Pure: plain values in, plain values out."""

from mii_serve.scheduler.core import Position, Scheduler

__all__ = ["Position", "Scheduler"]
