"""What a run needs before it is started: bytes that ranks hold and send, and estimates of the time; no weights."""
