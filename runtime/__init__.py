"""What keeps a run alive: files, processes, logs. Nothing here is about attention."""
