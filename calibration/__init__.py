"""Calibration: which conversations set the activation scales, and the run that sets them."""

from qat.calibration.run import CalibrationReport, calibrate

__all__ = ["CalibrationReport", "calibrate"]
