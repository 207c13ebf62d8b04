"""Trained models as programs that run without this package: StableHLO, SavedModel, ONNX."""
