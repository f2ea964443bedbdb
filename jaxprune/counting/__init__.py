"""What a network costs: its entries, its multiply-adds, its time. `jaxprune.metrics` is the public face."""
