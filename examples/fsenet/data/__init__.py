"""Drawn faces, readers of pictures, and the batches that training sees."""
