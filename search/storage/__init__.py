"""Where a study and its trials are kept: files, an object store, PostgreSQL; and who may write them."""
