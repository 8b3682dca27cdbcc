"""What a format will cost: the scaling law of floating-point quantization training, fitted or as published."""
