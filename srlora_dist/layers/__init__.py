"""The adapted matrices, and the algebra on a span of them; knows no ranks."""
