"""Measuring a model on this machine: what `kvstore profile` does (docs/profiles.md)."""

from kvstore.profiles.measuring.measure import Measurement, measure
from kvstore.profiles.measuring.settings import MeasuringSettings
from kvstore.profiles.measuring.subject import Subject

__all__ = ["Measurement", "MeasuringSettings", "Subject", "measure"]
