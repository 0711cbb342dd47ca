"""What ``robustkern scaling`` measures, models and draws."""
