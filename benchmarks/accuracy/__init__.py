"""The accuracy harness: tasks, methods, and the retriever that they are measured on."""
