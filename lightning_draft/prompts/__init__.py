# Shipped prompt lists: one prompt a line.
