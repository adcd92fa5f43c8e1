"""What is trained: data, loss, metrics. A task is one file with a `Task`; the rest is what tasks share."""
