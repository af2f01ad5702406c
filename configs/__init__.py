# Shipped configs.
