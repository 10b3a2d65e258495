"""Stage ingest: documents to chunks to embeddings in a vector store."""
