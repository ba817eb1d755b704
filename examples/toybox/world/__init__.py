"""A small world of coloured shapes, its pictures, and questions about them in two languages."""
