"""Distribution-free guarantees: the statistics, on arrays; knows no model."""
