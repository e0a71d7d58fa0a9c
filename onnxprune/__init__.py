"""Channel pruning of ONNX models."""
