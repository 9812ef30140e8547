"""What crosses between a coordinator and an expert: messages, and logits in shared memory."""
