"""Which pictures are compared, and how the comparisons become numbers."""
