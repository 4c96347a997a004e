"""Policy servers: models of a bundle behind gRPC, with onnxruntime and without torch."""
