"""Decides which samples make a step next. Pure: no clock, no I/O, no logging, no torch."""

from mii_serve.scheduler.core import Scheduler

__all__ = ["Scheduler"]
