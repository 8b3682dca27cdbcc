"""What comes out of training: low-bit checkpoints that engines load, bit for bit the model that was evaluated."""
