"""The process of one expert: its gRPC service and the thread that runs the model."""
