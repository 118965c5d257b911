"""What a person reads when a search has run: tables, pictures, one page, TensorBoard, and loggers of others."""
