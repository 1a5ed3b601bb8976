"""What several tasks share: texts and tokens, the encoder, pooling."""
