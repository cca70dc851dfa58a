"""From scores and prices to the units that go."""
